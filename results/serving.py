"""What [BE] costs on a server, by the way it is served: vLLM's time to the first token, and to sixteen.

    python results/serving.py           # out/demo/be.pt (make demo) -> results/serving.json and a table

Three servers stand side by side: the base model with the adapter, started as export.py says; the same with vLLM's own
settings for adapters, which have room for rank 16 in every layer; and the exported checkpoint, which reads the full
prompt, too. Each query goes to all ways, one after the other, in an order drawn anew, so that a drift of the machine
meets them all; a ratio is of two answers to one query. Once without a prefix cache, and once with one that has read the
prompt before. fp32, one thread; vLLM stands in .venv-vllm or NANOBE_VLLM_VENV (requirements-serving.txt).
"""
import argparse, contextlib, json, os, random, re, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path
from statistics import median

import openai
import torch

ROOT = Path(__file__).resolve().parent.parent
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--block-size", "32"]
LORA = ["--enable-lora", "--lora-target-modules", "embed_tokens", "--max-lora-rank", "1"]
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
         "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
CACHE = {"off": ["--no-enable-prefix-caching"], "warm": []}
PAIRS = [("adapter", "checkpoint"), ("adapter, vLLM's settings", "checkpoint"), ("full prompt", "adapter")]


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


def ask(client, model, system, query):
    """An answer of one token and one of sixteen -> ms until each is there, and how many tokens were fed."""
    messages, found = [{"role": "system", "content": system}, {"role": "user", "content": query}], {}
    for name, tokens in ("first, ms", 1), ("sixteen, ms", 16):      # no stream: a busy server sends several at once
        began = time.perf_counter()
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=tokens,
                                                extra_body={"ignore_eos": True})
        found[name] = 1e3 * (time.perf_counter() - began)
    return found | {"tokens fed": answer.usage.prompt_tokens}


def spread(values, digits=0):
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(median(values), min(values), max(values), d=digits)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--be", default=ROOT / "out/demo/be.pt", help="an artifact of stage 2")
    p.add_argument("--out", default=ROOT / "results/serving.json")
    args = p.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    python = Path(os.environ.get("NANOBE_VLLM_VENV") or ROOT / ".venv-vllm").absolute() / "bin/python"
    be = torch.load(args.be, weights_only=True)
    queries = (ROOT / "prompts/pirate.test.txt").read_text(encoding="utf-8").splitlines()[:24]
    prompt, base = be["messages"][0]["content"], be["model"]["name"]
    look = "import importlib.metadata as m; print('vllm-cpu', m.version('vllm-cpu'), 'torch', m.version('torch'))"
    versions = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    result = {"machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "load before": os.getloadavg()[0]},
              "versions": versions, "model": base, "dtype": "float32", "rows": [], "ratios": []}

    with tempfile.TemporaryDirectory() as folder:
        adapter, checkpoint = Path(folder, "be"), Path(folder, "model")
        for way in ["--adapter", adapter], ["--out", checkpoint, "--dtype", "float32"]:
            subprocess.run([sys.executable, ROOT / "export.py", args.be, *way], cwd=ROOT, check=True)
        token = json.loads((adapter / "nanobe.json").read_text())[0]["system message"]
        lora = [*VLLM, "--model", base, "--enable-lora", "--lora-modules", f"be={adapter}"]
        whole = [*VLLM, "--model", checkpoint, "--served-model-name", "model"]
        for cache, option in CACHE.items():
            with (server(python, lora + LORA + option, Path(folder, "one.log")) as one,
                  server(python, lora + option, Path(folder, "two.log")) as two,
                  server(python, whole + option, Path(folder, "three.log")) as three):
                ways = {"adapter": (one, "be", token), "adapter, vLLM's settings": (two, "be", token),
                        "checkpoint": (three, "model", "<|be:model|>"), "full prompt": (three, "model", prompt)}
                found, rng = {way: [] for way in ways}, random.Random(0)
                for i, query in enumerate(queries):
                    for way in rng.sample(sorted(ways), len(ways)):
                        measured = ask(*ways[way], query)
                        if i >= 4:                          # the first passes of a server are slow
                            found[way].append(measured)
            for way, rows in found.items():
                columns = {key: [row[key] for row in rows] for key in rows[0]}
                result["rows"].append({"prefix cache": cache, "way": way, "n": len(rows), **columns})
                print("|", cache, "|", way, *(f"| {spread(x)}" for x in columns.values()), "|", len(rows), "|")
            for a, b in PAIRS:
                times = {key: [x[key] / y[key] for x, y in zip(found[a], found[b])] for key in columns if "ms" in key}
                line = {key.removesuffix(", ms"): spread(x, 2) for key, x in times.items()}
                result["ratios"].append({"prefix cache": cache, "ratio": f"{a} / {b}", "n": len(rows), **line})
                print(result["ratios"][-1], flush=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
