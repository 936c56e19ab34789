"""The exported default model, and [BE] as prompt embeds, on a real vLLM server: fp32, greedy, token by token what infer.py says.   make test-serving"""
import base64
import io
import re

import pytest
import torch

import servers
from servers import VLLM, ask, chat, greedy, queries, server

pytestmark = pytest.mark.serving
IDS = {"extra_body": {"return_token_ids": True}}
LIMIT = 24


@pytest.fixture(scope="module")
def e():
    return servers.exported()


@pytest.fixture(scope="module")
def url(e):
    """The exported folder, which has both tokens."""
    with server([*VLLM, "--model", e.served], e.folder / "vllm.log") as address:
        yield address


@pytest.fixture(scope="module")
def embeds_url(e, url):
    """The untouched base model, with --enable-prompt-embeds. It starts while the other one still runs: there is room for both."""
    with server([*VLLM, "--model", servers.ROOT / servers.MODEL, "--enable-prompt-embeds"], e.folder / "embeds.log") as address:
        yield address


def spoken(e, answer):
    """An answer's ids without the stop token, and a check that its text is theirs."""
    ids = [t for t in answer.ids if t != e.model.generation_config.eos_token_id]
    assert answer.text == e.tokenizer.decode(ids, skip_special_tokens=True)
    return ids


@pytest.fixture(scope="module")
def told(e, url):
    """20 test queries, one at a time."""
    return ask(url, [chat("<|be:pirate|>", q) for q in queries(20)], max_tokens=LIMIT, **IDS)


def test_the_exported_token_answers_as_infer_does(e, told):
    for q, answer in zip(queries(20), told, strict=True):
        assert spoken(e, answer) == greedy("pirate", "chat", q, LIMIT), q
        assert answer.prompt_ids.count(e.new["pirate"][0]) == 1
    assert len({a.text for a in told}) > 10


def test_the_token_is_never_in_an_answer(e, url, told):
    """Nor is it sampled at a temperature of 1.2, with 8 requests at once; vLLM knows nothing of suppress_tokens."""
    warm = ask(url, [chat("<|be:pirate|>", q) for q in queries(16)], at_once=8, temperature=1.2, seed=1, max_tokens=48, **IDS)
    said = [t for a in told + warm for t in a.ids]
    assert len(said) > 600 and not set(said) & set(e.new["pirate"] + e.new["two"])


def test_several_tokens_in_place_of_the_block_answer_as_infer_does(e, url):
    """Layout block, k = 2: the shipped template takes the block away and writes the two tokens."""
    for q, answer in zip(queries(5), ask(url, [chat("<|be:two|>", q) for q in queries(5)], max_tokens=LIMIT, **IDS)):
        assert spoken(e, answer) == greedy("two", "block", q, LIMIT), q
        assert answer.prompt_ids[:2] == e.new["two"]


def test_prompt_embeds_answer_as_infer_does(e, embeds_url):
    for q, answer in zip(queries(20), ask(embeds_url, [chat(e.message["pirate"], q) for q in queries(20)], max_tokens=LIMIT, **IDS), strict=True):
        assert spoken(e, answer) == greedy("pirate", "chat", q, LIMIT), q


def test_one_server_takes_any_number_of_vectors(e, embeds_url):
    """Another vector in each request, of other lengths; at once, and with none at all in between."""
    jobs = [chat(e.message[name], q) for q in queries(4) for name in ("pirate", "two")] + [{"messages": [{"role": "user", "content": queries(1)[0]}]}]
    answers = ask(embeds_url, jobs, at_once=4, max_tokens=12, **IDS)
    wanted = [greedy(name, "chat", q, 12) for q in queries(4) for name in ("pirate", "two")]
    assert [spoken(e, a) for a in answers[:-1]] == wanted
    ids = e.infer.chat_ids(e.tokenizer, jobs[-1]["messages"])
    assert spoken(e, answers[-1]) == list(e.infer.answer(e.model, ids, torch.zeros(1, e.pirate["model"]["d"]), {e.model.generation_config.eos_token_id}, 12, 0, None))


def test_a_stream_says_the_same(url, told):
    answer, = ask(url, [chat("<|be:pirate|>", queries(1)[0])], max_tokens=LIMIT, stream=True)
    assert answer.text == told[0].text and len(answer.pieces) > 5 and answer.reason == told[0].reason


def test_32_requests_8_at_once_and_the_metrics(e, url, told):
    def count(name):
        return sum(float(v) for v in re.findall(rf"^vllm:{name}(?:{{.*?}})? (\S+)$", servers.get(f"{url}/metrics"), re.M))
    names = ("generation_tokens_total", "prompt_tokens_total", "request_success_total")
    before = [count(name) for name in names]
    asked = [queries(20)[i % 20] for i in range(32)]
    answers = ask(url, [chat("<|be:pirate|>", q) for q in asked], at_once=8, max_tokens=12, **IDS)
    assert [a.status for a in answers] == [200] * 32
    assert [spoken(e, a) for a in answers] == [spoken(e, told[i % 20])[:12] for i in range(32)]
    after = [count(name) for name in names]
    assert [b - a for a, b in zip(before, after)] == [sum(a.usage["completion_tokens"] for a in answers), sum(a.usage["prompt_tokens"] for a in answers), 32]
    assert count("num_requests_running") == 0


def test_a_user_who_spells_the_token_gets_the_token(e, url):
    """k = 1: the text is parsed as the token wherever it stands. The short name of several tokens means them in the system message only."""
    for name, found in (("pirate", e.new["pirate"]), ("two", [])):
        answer, = ask(url, [{"messages": [{"role": "user", "content": f"What is <|be:{name}|>?"}]}], max_tokens=4, **IDS)
        assert answer.status == 200 and [t for t in answer.prompt_ids if t in e.new["pirate"] + e.new["two"]] == found


def test_an_unknown_name_is_text(e, url):
    system, q = "<|be:nobody|>", queries(1)[0]
    answer, = ask(url, [chat(system, q)], max_tokens=8, **IDS)
    ids = e.infer.chat_ids(e.tokenizer, chat(system, q)["messages"])
    assert answer.status == 200 and answer.prompt_ids == ids and len(ids) > 25
    assert spoken(e, answer) == list(e.infer.answer(e.model, ids, e.pirate["vector"], {e.model.generation_config.eos_token_id}, 8, 0, None))


def test_an_overlong_query_is_refused(url, embeds_url, e):
    for address, system in ((url, "<|be:pirate|>"), (embeds_url, e.message["pirate"])):
        long, short = ask(address, [chat(system, "rice " * 2000), chat(system, "rice")], max_tokens=4)
        assert long.status == 400 and "maximum context length is 1024 tokens" in long.error
        assert short.status == 200                                          # and the server lives on


def test_a_system_message_in_parts_is_the_same(url, told):
    part = {"role": "system", "content": [{"type": "text", "text": "<|be:pirate|>"}]}
    answer, = ask(url, [chat(part, queries(1)[0])], max_tokens=LIMIT)
    assert answer.text == told[0].text


def test_a_vector_of_another_model_is_refused(e, embeds_url):
    file = io.BytesIO()
    torch.save(torch.zeros(1, 64), file)
    message = {"role": "system", "content": [{"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}]}
    answer, = ask(embeds_url, [chat(message, "Hello")], max_tokens=4)
    assert answer.status == 400 and "hidden_size 64 does not match the model's hidden_size 576" in answer.error
