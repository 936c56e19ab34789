"""The three exports on real engines on loopback, in fp32 and greedy: token by token what infer.py says.

    make test-serving           # vLLM stands in .venv-vllm or NANOBE_VLLM_VENV (requirements-serving.txt)
"""
import contextlib, functools, json, os, signal, socket, subprocess, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script

pytestmark = pytest.mark.serving
openai = pytest.importorskip("openai")
MODEL = "models/smollm2-135m"
ROLES = ["Walt_Kowalski", "Jack_Sparrow"]
LIMIT = 24
QUERIES = (ROOT / "prompts/pirate.test.txt").read_text(encoding="utf-8").splitlines()[:20]
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--block-size", "32"]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
         "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@pytest.fixture(scope="module")
def infer():
    return script("infer")


@pytest.fixture(scope="module")
def frozen(infer):
    return infer.load_frozen(MODEL, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """adapters/NAME, checkpoint/ with Walt_Kowalski's token, and NAME.json with the prompt embeds of each."""
    folder = tmp_path_factory.mktemp("exports")
    files = [f"artifacts/roles/{name}.pt" for name in ROLES]
    jobs = [[*files, "--adapter", folder / "adapters"],
            [files[0], "--out", folder / "checkpoint", "--dtype", "float32"]]
    for job in jobs + [[file, "--prompt-embeds", folder / f"{name}.json"] for name, file in zip(ROLES, files)]:
        subprocess.run([sys.executable, "export.py", *map(str, job)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def said(infer, frozen):
    """The untouched model's own greedy answers: said(role or None, system message, query) -> text."""
    model, tokenizer = frozen

    @functools.cache
    def answer(role, system, query):
        turns, be = [{"role": "user", "content": query}], torch.zeros(1, model.config.hidden_size)
        token = [tokenizer.convert_tokens_to_ids(system)]
        ids = infer.chat_ids(tokenizer, [{"role": "system", "content": token}] + turns)
        if role:
            be = torch.load(ROOT / f"artifacts/roles/{role}.pt", weights_only=True)["vector"]
            ids = infer.layout_ids(tokenizer, "chat", [-1], turns)
        return tokenizer.decode(list(infer.speak(model, ids, be, LIMIT)), skip_special_tokens=True)
    return answer


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
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def ask(client, model, system, query):
    messages = [system if isinstance(system, dict) else {"role": "system", "content": system},
                {"role": "user", "content": query}]
    answer = client.chat.completions.create(model=str(model), messages=messages, temperature=0, max_tokens=LIMIT)
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def vllm():
    python = Path(os.environ.get("NANOBE_VLLM_VENV") or ROOT / ".venv-vllm") / "bin/python"
    if not python.exists():
        pytest.skip("no vLLM: make .venv-vllm/installed")
    return str(python)


@pytest.fixture(scope="module")
def token(folder):
    return json.loads((folder / "adapters/nanobe.json").read_text())[0]["system message"]


@pytest.fixture(scope="module")
def lora(vllm, folder):
    """The base model with the first adapter, its prefix cache on; the second is loaded while it runs."""
    walt = f"{ROLES[0]}={folder / 'adapters' / ROLES[0]}"
    arguments = [*VLLM, "--model", MODEL, "--enable-lora", "--max-loras", 2, "--lora-modules", walt]
    with server(vllm, arguments, folder / "lora.log") as client:
        client.post("/load_lora_adapter", cast_to=str, body={
            "lora_name": ROLES[1], "lora_path": str(folder / "adapters" / ROLES[1])})
        yield client


def test_an_adapter_answers_as_infer_does(lora, token, said):
    for query in QUERIES:
        assert ask(lora, ROLES[0], token, query) == said(ROLES[0], token, query)


def test_two_adapters_and_the_base_model_in_turn(lora, token, said):
    """The same system message and query to each: a shared prefix cache would show."""
    for query in QUERIES[:8]:
        for role in (*ROLES, None, *ROLES[::-1]):
            assert ask(lora, role or MODEL, token, query) == said(role, token, query)
    assert len({said(role, token, QUERIES[0]) for role in (*ROLES, None)}) == 3


def test_32_requests_8_at_once(lora, token, said):
    jobs = [((*ROLES, None)[i % 3], QUERIES[i % 8]) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: ask(lora, job[0] or MODEL, token, job[1]), jobs))
    assert answers == [said(role, token, query) for role, query in jobs]


def test_prompt_embeds_answer_as_infer_does(vllm, folder, token, said):
    with server(vllm, [*VLLM, "--model", MODEL, "--enable-prompt-embeds"], folder / "embeds.log") as client:
        for role in ROLES:
            message = json.loads((folder / f"{role}.json").read_text())
            for query in QUERIES[:5]:
                assert ask(client, MODEL, message, query) == said(role, token, query)


def test_the_checkpoint_answers_as_infer_does(vllm, folder, token, said):
    with server(vllm, [*VLLM, "--model", folder / "checkpoint"], folder / "checkpoint.log") as client:
        for query in QUERIES:
            assert ask(client, folder / "checkpoint", "<|be:checkpoint|>", query) == said(ROLES[0], token, query)


def test_transformers_serve_answers_as_infer_does(folder, token, said):
    pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
    command = [Path(sys.executable).with_name("transformers"), "serve", folder / "checkpoint", "--device", "cpu"]
    with server(sys.executable, command, folder / "serve.log") as client:
        for query in QUERIES:
            assert ask(client, folder / "checkpoint", "<|be:checkpoint|>", query) == said(ROLES[0], token, query)


def test_peft_answers_as_infer_does(folder, frozen, token, said):
    peft = pytest.importorskip("peft")
    model, tokenizer = frozen
    model = peft.PeftModel.from_pretrained(model, folder / "adapters" / ROLES[0])
    with contextlib.ExitStack() as stack:
        stack.callback(model.unload)                        # the fixture's model is as it was after this
        for query in QUERIES:
            messages = [{"role": "system", "content": token}, {"role": "user", "content": query}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                                return_dict=False)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False)
            assert tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True) == said(ROLES[0], token, query)
