"""The three exports on real engines on loopback, in fp32 and greedy: token by token what infer.py says.

    make test-serving           # vLLM stands in .venv-vllm or NANOBE_VLLM_VENV (requirements-serving.txt)
"""
import functools, json, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, main, script

pytestmark = pytest.mark.serving
openai = pytest.importorskip("openai")
MODEL = "models/smollm2-135m"
ROLES = ["Walt_Kowalski", "Jack_Sparrow"]
LIMIT = 24
QUERIES = (ROOT / "prompts/pirate.test.txt").read_text(encoding="utf-8").splitlines()[:20]
infer, bench = script("infer"), script("results/serving")
server, VLLM = bench.server, bench.VLLM


@pytest.fixture(scope="module")
def frozen():
    model, tokenizer = infer.load_frozen(MODEL, "cpu")
    ends = model.generation_config.eos_token_id             # as in infer.py: these alone
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """adapters/NAME, checkpoint/ with Walt_Kowalski's token, and NAME.json with the prompt embeds of each."""
    folder = tmp_path_factory.mktemp("exports")
    files = [f"artifacts/roles/{name}.pt" for name in ROLES]
    jobs = [[file, "--prompt-embeds", folder / f"{name}.json"] for name, file in zip(ROLES, files)]
    jobs += [[*files, "--adapter", folder / "adapters"],
             [files[0], "--out", folder / "checkpoint", "--dtype", "float32"]]
    assert all(main("export", *job, cwd=ROOT).code == 0 for job in jobs)
    return folder


@pytest.fixture(scope="module")
def said(frozen):
    """The untouched model's own greedy answers: said(role or None, system message, query) -> token ids."""
    model, tokenizer = frozen

    @functools.cache
    def answer(role, system, query):
        turns, be = [{"role": "user", "content": query}], torch.zeros(1, model.config.hidden_size)
        system = tokenizer(system, add_special_tokens=False)["input_ids"]           # a token's name is the token here
        ids = infer.chat_ids(tokenizer, [{"role": "system", "content": system}] + turns)
        if role:
            be = torch.load(ROOT / f"artifacts/roles/{role}.pt", weights_only=True)["vector"]
            ids = infer.chat_ids(tokenizer, [{"role": "system", "content": [-1]}] + turns)
        embeds = infer.embed(model, torch.tensor([ids]), be)
        said = model.generate(inputs_embeds=embeds, max_new_tokens=LIMIT)[0].tolist()
        return said[:-1] if said[-1] in model.generation_config.eos_token_id else said
    return answer


def ask(client, model, system, query, **more):
    messages = [system if isinstance(system, dict) else {"role": "system", "content": system},
                {"role": "user", "content": query}]
    return client.chat.completions.create(model=str(model), messages=messages, temperature=0, max_tokens=LIMIT,
                                          **more).choices[0]


def ask_vllm(client, model, system, query):
    """-> the answer's token ids, without the one that ends the turn, as infer.py has them."""
    answer = ask(client, model, system, query, extra_body={"return_token_ids": True})
    return answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids


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
    arguments = [*VLLM, *bench.LORA, "--max-loras", 2, "--model", MODEL, "--lora-modules", walt]
    with server(vllm, arguments, folder / "lora.log") as client:
        client.post("/load_lora_adapter", cast_to=str, body={
            "lora_name": ROLES[1], "lora_path": str(folder / "adapters" / ROLES[1])})
        yield client


def test_two_adapters_and_the_base_model_in_turn_answer_as_infer_does(lora, token, said):
    """The same system message and query to each: a shared prefix cache would show."""
    for query in QUERIES:
        for role in (*ROLES, None, ROLES[0]):
            assert ask_vllm(lora, role or MODEL, token, query) == said(role, token, query)
    assert len({tuple(said(role, token, QUERIES[0])) for role in (*ROLES, None)}) == 3       # else it shows nothing


def test_32_requests_8_at_once(lora, token, said):
    """The base model is asked without the token: in vLLM 0.32 on a CPU a request without an adapter that shares a batch
    with one that has one is given that adapter, too (vLLM's pull request 48421), which only moves that token's row."""
    asked = [(ROLES[0], token), (ROLES[1], token), (None, "You are a helpful assistant.")]
    jobs = [(*asked[i % 3], QUERIES[i % 8]) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: ask_vllm(lora, job[0] or MODEL, *job[1:]), jobs))
    assert answers == [said(*job) for job in jobs]


def test_prompt_embeds_answer_as_infer_does(vllm, folder, token, said):
    with server(vllm, [*VLLM, "--model", MODEL, "--enable-prompt-embeds"], folder / "embeds.log") as client:
        for role in ROLES:
            message = json.loads((folder / f"{role}.json").read_text())
            for query in QUERIES[:10]:
                assert ask_vllm(client, MODEL, message, query) == said(role, token, query)


def test_the_checkpoint_answers_as_infer_does(vllm, folder, token, said):
    with server(vllm, [*VLLM, "--model", folder / "checkpoint"], folder / "checkpoint.log") as client:
        for query in QUERIES:
            assert ask_vllm(client, folder / "checkpoint", "<|be:checkpoint|>", query) == said(ROLES[0], token, query)


def test_transformers_serve_answers_as_infer_does(folder, frozen, token, said):
    pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
    command = [Path(sys.executable).with_name("transformers"), "serve", folder / "checkpoint", "--device", "cpu"]
    with server(sys.executable, command, folder / "serve.log") as client:
        for query in QUERIES:
            answer = ask(client, folder / "checkpoint", "<|be:checkpoint|>", query).message.content
            assert answer == frozen[1].decode(said(ROLES[0], token, query), skip_special_tokens=True)
