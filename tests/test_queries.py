"""Queries: the files that stage 2 reads, and queries.py, which has the model ask them."""
import json

import pytest
import torch
import transformers

from conftest import TINY, build_tokenizer, caught, main, refused, script

kd, queries = script("stage2_kd"), script("queries")


def user(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.mark.parametrize("name, content, expected", [
    ("q.txt", "\ufeffWhy?\n\n  How? \r\nWhy?\n", user("Why?", "How?")),
    ("q.txt", "[Sighs] Why?\n{name}, how?\n[1] Who?\n", user("[Sighs] Why?", "{name}, how?", "[1] Who?")),
    ("q.txt", '{"question": "Why?", "answer": "x"}\n\n{"query": " How? "}\n', user("Why?", "How?")),
    ("Q.NDJSON", '{"instruction": "Translate.", "input": "Aye."}\n{"instruction": "Why?", "input": ""}\n',
     user("Translate.\n\nAye.", "Why?")),
    ("q.JSONL", '{"question": "a\\u2028b?"}\n{"question": "日本？"}\n', user("a\u2028b?", "日本？")),
    ("q.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Aye."},
                                         {"role": "user", "content": " Why? "}]}),
     [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Aye."}, *user("Why?")[0]]]),
    ("q.txt", "a\u2028b?\n\x85c?\n", user("a\u2028b?", "c?")),
])
def test_a_row_of_queries_is_a_chat(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert kd.read_queries(str(tmp_path / name)) == expected


@pytest.mark.parametrize("name, broken", [
    ("q.jsonl", '{"query": "Ho'), ("q.jsonl", '{"query": 7}'), ("q.jsonl", '{"answer": "a"}'),
    ("q.jsonl", '{"messages": [{"role": "assistant", "content": "Aye."}]}'),
    ("q.jsonl", '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}'),
    ("q.txt", '["Why?", "How?"]'), ("q.txt", "[\n"), ("q.csv", "id,question")])
def test_a_row_that_is_not_understood_is_named_and_never_trained_on(name, broken, tmp_path):
    good = "Why?" if name == "q.txt" else '{"query": "Why?"}'
    (tmp_path / name).write_text(f"{good}\n\n{broken}\n{good}\n")
    refused(caught(kd.read_queries, str(tmp_path / name)), f"{name}, line 3")


@pytest.mark.parametrize("line, expected", [
    ("1. What is your ship's name?", "What is your ship's name?"), ("(3) Who are you?", "Who are you?"),
    ("* **Why is it cold?**", "Why is it cold?"), ("**4.** Where is it?", "Where is it?"),
    ("Q5: When is it?", "When is it?"), ("“Where is she?”", "Where is she?"),
    ("6. 「港はどこですか？」", "港はどこですか？"), ("1、你叫什么名字？", "你叫什么名字？"),
    ("- ما اسمك يا صديقي؟", "ما اسمك يا صديقي؟"), ("• ¿Cómo te llamas?", "¿Cómo te llamas?"),
    ("8. «Où est le port ?»", "Où est le port ?"), ("Πού είναι το λιμάνι;", "Πού είναι το λιμάνι;"),
    ("What is 2 * 3 * 4?", "What is 2 * 3 * 4?"), ("3.5 or 4, which is more?", "3.5 or 4, which is more?"),
    ("2024 was good, was it?", "2024 was good, was it?"), ("What do you mean?!", "What do you mean?!"),
    ("I cannot say.", ""), ("?", ""), ("", ""), ("Fine; it is", ""), ('{"question": "Why is it so?"', ""),
    ("What is \ufffd?", ""), ("Why? " * 99 + "Why?", "")])
def test_a_line_of_a_models_list_becomes_its_question(line, expected):
    assert queries.clean(line) == expected


@pytest.mark.parametrize("text, expected", [
    ("Here they are:\n1. What is your ship's name?\n2. How old are you?\n3. what is your SHIP'S name?\nNo.",
     ["What is your ship's name?", "How old are you?"]),
    ("I cannot say.", [])])
def test_the_file_is_what_the_model_asked_each_question_once(text, expected, checkpoints, work, monkeypatch):
    tokenizer, asked = build_tokenizer("smol"), []

    def generate(model, ids, **settings):
        asked.append(tokenizer.decode(ids[0]))
        said = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([ids, said], 1).repeat(2, 1)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    r = main("queries", "--prompt", "p.txt", "--model", checkpoints["smol"], "--count", 3, "--out", "new.txt", *TINY)
    assert len(asked) > 1 and all("You are the old captain." in text for text in asked)
    if expected:
        assert r.code == 0 and (work / "new.txt").read_text() == "".join(f"{q}\n" for q in expected), r.err
        assert expected[0] in r.out and "--queries new.txt" in r.out and "read it" in r.out
        assert kd.read_queries("new.txt") == user(*expected)
    else:
        refused(r, "new.txt")
        assert not (work / "new.txt").exists()
