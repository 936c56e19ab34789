"""What the tests of serving share: a venv with vLLM, the exported default model, a server on loopback, the openai client, and infer.py's own answers to compare with."""
import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import torch

from conftest import CPU, ROOT, load_script

MODEL = "models/smollm2-135m"
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--block-size", "32", "--served-model-name", "be"]


@functools.cache
def venv():
    """The Python of a venv with vLLM: NANOBE_VLLM_VENV, else .venv-vllm, which is made once (3 GB)."""
    folder = Path(os.environ.get("NANOBE_VLLM_VENV") or ROOT / ".venv-vllm")
    python = folder / "bin/python"
    if not (folder / "installed").exists() and not os.environ.get("NANOBE_VLLM_VENV"):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", ROOT / "requirements-serving.txt"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
        (folder / "installed").touch()
    return str(python)


def script(*arguments):
    """One of the project's own scripts, from the repository's folder -> what it printed."""
    r = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout


@functools.cache
def exported():
    """The default model in fp32 with two tokens: <|be:pirate|> (layout chat, the demo's vector, or one distilled in a few steps), and <|be:two|> (layout block,
    k = 2, random)."""
    folder = Path(tempfile.mkdtemp(prefix="nanobe-serving-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    be = ROOT / "out/demo/be.pt"
    if not be.exists():
        queries = (ROOT / "prompts/pirate.queries.txt").read_text().splitlines()[:24]
        (folder / "q.txt").write_text("\n".join(queries))
        be = folder / "be.pt"
        script("stage2_kd.py", "--prompt", "prompts/pirate.txt", "--queries", folder / "q.txt", "--test-queries", folder / "q.txt", "--init", "random", "--lam", 1,
               "--steps", 12, "--answer-tokens", 8, "--lr", 0.1, "--out", be)
    one = torch.load(be, weights_only=True)
    assert one["layout"] == "chat" and len(one["vector"]) == 1
    infer = load_script("infer")
    model, tokenizer = infer.load_frozen(str(ROOT / MODEL), CPU, torch.float32, "eager")
    table = model.get_input_embeddings().weight
    two = {**one, "layout": "block", "vector": table.mean(0) + table.std(0) * torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(0))}
    save = load_script("stage2_kd").save_artifact
    save(folder / "two.pt", two)
    printed = script("export.py", be, folder / "two.pt", "--names", "pirate", "two", "--out", folder / "served", "--dtype", "fp32")
    script("export.py", be, "--prompt-embeds", folder / "pirate.json")
    save(folder / "two.chat.pt", {**two, "layout": "chat"})
    script("export.py", folder / "two.chat.pt", "--prompt-embeds", folder / "two.json")
    tokens = json.loads((folder / "served/nanobe.json").read_text())["tokens"]
    return SimpleNamespace(folder=folder, served=folder / "served", infer=infer, model=model, tokenizer=tokenizer, printed=printed, pirate=one, two=two,
                           message={name: json.loads((folder / f"{name}.json").read_text()) for name in ("pirate", "two")},
                           new={name: tokens[f"<|be:{name}|>"]["ids"] for name in ("pirate", "two")})


def queries(n):
    return (ROOT / "prompts/pirate.test.txt").read_text(encoding="utf-8").splitlines()[:n]


@functools.cache
def greedy(name, layout, query, limit):
    """infer.py's own greedy answer with the hook, the base model untouched, fp32 -> token ids."""
    e = exported()
    vector = getattr(e, name)["vector"]
    ids = e.infer.layout_ids(e.tokenizer, layout, [-1 - i for i in range(len(vector))], [{"role": "user", "content": query}])
    return list(e.infer.answer(e.model, ids, vector, {e.model.generation_config.eos_token_id}, limit, 0, None))


def get(url):
    with urllib.request.urlopen(url, timeout=60) as r:
        return r.read().decode()


@contextlib.contextmanager
def server(arguments, log):
    """`python ...` of the venv, with --port, as a server of its own process group -> its address; waits until /health answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(log, "w") as f:
        child = subprocess.Popen([venv(), *map(str, arguments), "--host", "127.0.0.1", "--port", str(port)], cwd=log.parent, stdout=f, stderr=f,
                                 env=os.environ | QUIET, start_new_session=True)
    try:
        for _ in range(1200):
            assert child.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            try:
                get(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)                                             # polling, not timing
        else:
            raise AssertionError(f"the server is not up:\n{log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def ask(url, jobs, at_once=1, **common):
    """Chat completions through the openai client -> list of SimpleNamespace(text, ids, prompt_ids, pieces, reason, usage, status, error).
    Each job: the arguments of create()."""
    jobs = [{"model": "be", "temperature": 0, "max_tokens": 24} | common | job for job in jobs]
    work = json.dumps({"url": f"{url}/v1", "jobs": jobs, "at_once": at_once})
    r = subprocess.run([venv(), Path(__file__).with_name("client.py")], input=work, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return [SimpleNamespace(**row) for row in json.loads(r.stdout)]


def chat(system, query):
    return {"messages": [system if isinstance(system, dict) else {"role": "system", "content": system}, {"role": "user", "content": query}]}
