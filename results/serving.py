"""When [BE] pays on a server: time to first token and throughput of vLLM with the full prompt and with [BE], prefix cache off, on, and too small for the prompts.

    python results/serving.py                     # -> results/serving.json, results/serving.png and the table; servers whose rows are in the file are not run again
    python results/serving.py --requests 2 --burst 4 --prompts 4 --repeats 1 --out out/serving.json       # a quick look

Reads   out/demo/be.pt (make demo) and its prompt's test queries. vLLM stands in a venv of its own: requirements-serving.txt.
Expect  10 minutes on two cores.

One exported model serves both arms, in turns: the system message is the prompt's text, or <|be:pirate|>. Three servers:
    off     no prefix cache
    on      vLLM's default, one prompt: the first request (the cache is emptied before each), and later ones
    small   32 different prompts in turn, and a cache of 4,096 tokens, which is less than they have: each is gone when it comes again
The 32 prompts are the one prompt with its words rotated, so that no two begin alike; on the other side [BE] is exported under 32 names, which are 32 different
tokens to the cache. The answers of both arms are cut at the same number of tokens, and none ends earlier.
"""
import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SERVERS = {"off": ["--no-enable-prefix-caching"], "on": [], "small": ["--num-gpu-blocks-override", "128"]}                 # 128 blocks of 32 tokens
CASES = {"off": "no prefix cache", "first": "cache on, first request", "warm": "cache on, one hot prompt", "small": "small cache, many prompts"}
ARMS = ("full prompt", "[BE]")


@contextlib.contextmanager
def server(python, model, options, args):
    """vLLM on a free port -> its address, once /health answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "be", "--host", "127.0.0.1", "--port", port,
               "--dtype", args.dtype, "--max-model-len", 1024, "--enforce-eager", "--block-size", 32, *options]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}      # dev: /reset_prefix_cache
    if args.threads:
        env["OMP_NUM_THREADS"] = str(args.threads)
    log = Path(model).parent / "server.log"
    with open(log, "w") as f:
        child = subprocess.Popen(list(map(str, command)), stdout=f, stderr=f, env=env, start_new_session=True)
    try:
        for _ in range(600):
            if child.poll() is not None:
                sys.exit(f"serving.py: the server ended; see {log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            time.sleep(0.5)
        else:
            sys.exit(f"serving.py: the server is not up after five minutes; see {log}")
        yield f"http://127.0.0.1:{port}"
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)


def ask(url, messages, tokens):
    """One streamed chat completion of exactly `tokens` tokens -> (seconds to the first, seconds in all, tokens fed)."""
    body = {"model": "be", "messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    started, first, usage = time.perf_counter(), None, None
    with urllib.request.urlopen(request, timeout=600) as r:
        for line in r:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - started
    if usage["completion_tokens"] != tokens or first is None:
        sys.exit(f"serving.py: expected {tokens} tokens, found {usage}")
    return first, time.perf_counter() - started, usage["prompt_tokens"]


def one_by_one(url, systems, queries, tokens, requests, empty=False, rounds=1):
    """TTFT of single requests, the arms in turns, so that a drift of the machine meets both -> {arm: {"ttft_ms", "fed"}}; of several rounds the last one counts."""
    found = {arm: {"ttft_ms": [], "fed": []} for arm in ARMS}
    for i in range(rounds * requests):
        for arm in ARMS:
            if empty:
                urllib.request.urlopen(urllib.request.Request(f"{url}/reset_prefix_cache", method="POST"), timeout=60)
            first, _, fed = ask(url, [systems[arm][i % len(systems[arm])], queries[i % len(queries)]], tokens)
            if i >= (rounds - 1) * requests:
                found[arm]["ttft_ms"].append(1000 * first)
                found[arm]["fed"].append(fed)
    return found


def burst(url, systems, queries, args):
    """Wall seconds of --burst requests, --at-once at a time -> {arm: one number a repeat}, the arms in turns."""
    found = {arm: [] for arm in ARMS}
    for _ in range(args.repeats):
        for arm in ARMS:
            chats = [[systems[arm][i % len(systems[arm])], queries[i % len(queries)]] for i in range(args.burst)]
            with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
                started = time.perf_counter()
                list(pool.map(lambda chat: ask(url, chat, args.tokens), chats))
                found[arm].append(time.perf_counter() - started)
    return found


def measure(name, url, systems, queries, args):
    """The rows of one server -> list of {"case", "arm", "ttft_ms", "fed", "burst_s"}."""
    one = {arm: s[:1] for arm, s in systems.items()}
    strangers = [{"role": "system", "content": "The quick brown fox jumps over the lazy dog. " * n} for n in (1, 40)]        # the first pass of a shape is slow
    for _ in range(2):
        for s in strangers:
            ask(url, [s, queries[0]], args.tokens)
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(lambda i: ask(url, [strangers[i % 2], queries[i % len(queries)]], args.tokens), range(2 * args.at_once)))
    if name == "on":
        parts = {"first": one_by_one(url, one, queries, args.tokens, args.requests, empty=True)}
        one_by_one(url, one, queries[:1], args.tokens, 1)
        parts["warm"] = one_by_one(url, one, queries, args.tokens, args.requests)
    elif name == "off":
        parts = {"off": one_by_one(url, one, queries, args.tokens, args.requests)}
    else:
        parts = {"small": one_by_one(url, systems, queries, args.tokens, max(args.requests, args.prompts), rounds=2)}
    walls = burst(url, systems if name == "small" else one, queries, args)
    return [{"case": case, "arm": arm, **found[arm]} | ({} if case == "first" else {"burst_s": walls[arm]}) for case, found in parts.items() for arm in ARMS]


def median(values, draws=2000):
    """The median and its 95% bootstrap interval."""
    x = torch.tensor(values, dtype=torch.float64)
    m = x[torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))].quantile(0.5, 1)
    return statistics.median(values), *m.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def table(result):
    """The rows as Markdown."""
    burst, at_once, tokens = (result["settings"][k] for k in ("burst", "at_once", "tokens"))
    lines = [f"| | tokens fed | TTFT, ms, median (95%) | n | {burst} requests of {tokens} tokens, {at_once} at once, s |", "|" + "---|" * 5]
    for r in sorted(result["rows"], key=lambda r: list(CASES).index(r["case"])):
        walls = f"{statistics.median(r['burst_s']):.2f} ({min(r['burst_s']):.2f} to {max(r['burst_s']):.2f})" if "burst_s" in r else ""
        lines.append(f"| {CASES[r['case']]}, {r['arm']} | {statistics.mean(r['fed']):.0f} | {'{:.0f} ({:.0f} to {:.0f})'.format(*median(r['ttft_ms']))} | {len(r['ttft_ms'])} | {walls} |")
    return "\n".join(lines)


def plot(result, path):
    figure = Figure(figsize=(11, 4))
    panels = {"ttft_ms": "time to first token, ms (median, 95%)", "burst_s": "{burst} requests, {at_once} at once, s".format(**result["settings"])}
    for ax, (key, title) in zip(figure.subplots(1, 2), panels.items()):
        cases = [c for c in CASES if any(r["case"] == c and key in r for r in result["rows"])]
        for j, arm in enumerate(ARMS):
            rows = [next(r for r in result["rows"] if r["case"] == c and r["arm"] == arm) for c in cases]
            mid = [median(r[key]) for r in rows]
            ax.bar([i + 0.4 * j - 0.2 for i in range(len(cases))], [m[0] for m in mid], 0.38, label=f"{arm}, {statistics.mean(rows[0]['fed']):.0f} tokens fed",
                   yerr=[[max(0, m[0] - m[1]) for m in mid], [max(0, m[2] - m[0]) for m in mid]], capsize=3)
        ax.set_xticks(range(len(cases)), [CASES[c].replace(", ", ",\n") for c in cases], fontsize=7)
        ax.set_title(title, fontsize=10)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--be",       default="out/demo/be.pt", help="an artifact of layout chat")
    add("--queries",  default="prompts/pirate.test.txt", help="a query a line")
    add("--venv",     default=os.environ.get("NANOBE_VLLM_VENV", ".venv-vllm"), help="where vLLM is installed; default: NANOBE_VLLM_VENV, else .venv-vllm")
    add("--out",      default="results/serving.json")
    add("--requests", type=int, default=20, help="single requests of each case and arm, for TTFT; in the case of many prompts at least one for each")
    add("--burst",    type=int, default=32, help="requests of a burst")
    add("--at-once",  type=int, default=8)
    add("--repeats",  type=int, default=3,  help="bursts")
    add("--prompts",  type=int, default=32, help="different prompts in turn")
    add("--tokens",   type=int, default=16, help="of each answer")
    add("--dtype",    default="bfloat16")
    add("--threads",  type=int, default=0,  help="OMP_NUM_THREADS of the server; 0: its own choice")
    args = p.parse_args()
    os.chdir(HERE.parent)
    out, python = Path(args.out), Path(args.venv, "bin/python").absolute()
    for path, how in ((args.be, "make it with: make demo"), (python, "install it as requirements-serving.txt says")):
        if not Path(path).exists():
            sys.exit(f"serving.py: {path} is not there; {how}")
    be = torch.load(args.be, weights_only=True)
    prompt = be["prompt"]["messages"][0]["content"]
    if be["layout"] != "chat" or len(be["prompt"]["messages"]) > 1:
        sys.exit(f"serving.py: {args.be}: expected an artifact of layout chat, whose prompt is one system message")
    settings = {k: v for k, v in vars(args).items() if k not in ("venv", "out")}
    result = json.loads(out.read_text()) if out.exists() else {}
    if result.get("settings") != settings:
        look = "import importlib.metadata as m; print(*[f'{d.name} {d.version}' for d in m.distributions() if d.name in ('vllm', 'vllm-cpu', 'torch')], sep=', ')"
        versions = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        cpu = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), platform.processor() or platform.machine())
        result = {"settings": settings, "machine": {"cpu": cpu, "cores": os.cpu_count(), "versions": versions}, "done": [], "rows": []}

    folder = Path("out/serving")
    names = [f"p{i}" for i in range(args.prompts)]
    if set(SERVERS) - set(result["done"]):
        print(f"exporting [BE] under {args.prompts} names", flush=True)
        r = subprocess.run([sys.executable, "export.py", *[args.be] * len(names), "--names", *names, "--out", folder / "model", "--overwrite"],
                           capture_output=True, text=True)
        if r.returncode:
            sys.exit(r.stderr)
    words = prompt.split()
    rotated = [" ".join(words[(at := i * len(words) // args.prompts):] + words[:at]) for i in range(args.prompts)]
    systems = {"full prompt": [{"role": "system", "content": text} for text in rotated],
               "[BE]": [{"role": "system", "content": f"<|be:{name}|>"} for name in names]}
    queries = [{"role": "user", "content": q} for q in Path(args.queries).read_text(encoding="utf-8").splitlines() if q.strip()]
    for name, options in SERVERS.items():
        if name in result["done"]:
            continue
        print(f"server: prefix cache {name}", flush=True)
        with server(python, folder / "model", options, args) as url:
            rows = measure(name, url, systems, queries, args)
        result["rows"] += rows
        result["done"].append(name)
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.tmp").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(f"{out}.tmp", out)
    plot(result, out.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
