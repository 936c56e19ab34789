"""The exported default model under `transformers serve`: the same text as infer.py's.   make test-serving"""
import pytest

import servers
from servers import ask, chat, greedy, queries, server

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def e():
    return servers.exported()


@pytest.fixture(scope="module")
def url(e):
    with server(["-m", "transformers.cli.transformers", "serve", e.served, "--device", "cpu", "--dtype", "float32"], e.folder / "transformers.log") as address:
        yield address


@pytest.mark.parametrize("name, layout", [("pirate", "chat"), ("two", "block")])
def test_it_says_what_infer_says(e, url, name, layout):
    answers = ask(url, [chat(f"<|be:{name}|>", q) for q in queries(3)], model=str(e.served), max_tokens=12)
    assert [a.text for a in answers] == [e.tokenizer.decode(greedy(name, layout, q, 12), skip_special_tokens=True) for q in queries(3)]
    for q, answer in zip(queries(3), answers):
        slots = [-1 - i for i in range(len(e.new[name]))]
        assert answer.usage["prompt_tokens"] == len(e.infer.layout_ids(e.tokenizer, layout, slots, [{"role": "user", "content": q}]))


def test_a_stream_says_the_same(e, url):
    answer, = ask(url, [chat("<|be:pirate|>", queries(1)[0])], model=str(e.served), max_tokens=12, stream=True)
    assert len(answer.pieces) > 3 and answer.text == e.tokenizer.decode(greedy("pirate", "chat", queries(1)[0], 12), skip_special_tokens=True)


def test_an_unknown_name_is_text(e, url):
    answer, = ask(url, [chat("<|be:nobody|>", "Hello")], model=str(e.served), max_tokens=4)
    assert answer.usage["prompt_tokens"] == len(e.infer.chat_ids(e.tokenizer, chat("<|be:nobody|>", "Hello")["messages"]))
