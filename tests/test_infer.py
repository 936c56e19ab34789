"""infer.py: the plain greedy answer, in the artifact's own layout; whole characters come out; a chat goes on."""
import os, re, subprocess, sys

import pytest
import torch

from conftest import PROMPT, ROOT, TINY, build_tokenizer, main, opened, plain_greedy, script

infer = script("infer")


def test_an_answer_is_the_plain_greedy_one(loaded, monkeypatch):
    model, tokenizer = loaded
    learned = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    row = infer.layout_ids(tokenizer, "chat", [-1, -2], [{"role": "user", "content": "Why is the sea cold?"}])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [])
    free = plain_greedy(model, row, learned, 9)
    assert list(infer.speak(model, row, learned, 9)) == free
    monkeypatch.setattr(model.generation_config, "eos_token_id", [499, free[4]])
    assert list(infer.speak(model, row, learned, 9)) == free[:free.index(free[4])]


@pytest.mark.parametrize("text", ["Aye, mate.", "été, naïve — 日本の港 🙂👩‍🚀", " two  spaces , and 'quotes' ."])
def test_whole_characters_come_out_though_one_takes_several_tokens(text, capsys):
    tokenizer = build_tokenizer("smol")
    ids = infer.text_ids(tokenizer, text)
    said, times = infer.stream(tokenizer, iter(ids))
    assert said == text.strip() and capsys.readouterr().out == f"{text.strip()}\n" and len(times) == len(ids) + 1
    if len(ids) > len(text):                                # cut within its last character: told, once, and no crash
        said, _ = infer.stream(tokenizer, iter(ids[:-1]))
        assert capsys.readouterr().out.count("\ufffd") == said.count("\ufffd") >= 1


@pytest.mark.parametrize("name", ["be", "block"])
def test_compare_feeds_the_prompt_the_slot_and_nothing(name, smol, vectors, work):
    model, tokenizer = smol
    be = opened(vectors / f"{name}.pt")
    turns = [{"role": "user", "content": "How many apples are left?"}]
    slot = [-1 - i for i in range(len(be["vector"]))]
    fed = {"full prompt": infer.chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns),
           "[BE]": infer.layout_ids(tokenizer, be["layout"], slot, turns),
           "no prompt": infer.layout_ids(tokenizer, be["layout"], [], turns)}
    r = main("infer", "--be", vectors / f"{name}.pt", "--query", "How many apples are left?", "--compare",
             "--max-new-tokens", 8, *TINY)
    assert r.code == 0, r.err
    parts = re.split(r"^--- (.+)\n", r.out, flags=re.M)
    answers = dict(zip(parts[1::2], parts[2::2]))
    assert list(answers) == list(fed) and len(fed["[BE]"]) == len(fed["no prompt"]) + len(slot)
    for condition, ids in fed.items():
        said = plain_greedy(model, ids, be["vector"], 8)
        said = said[:-1] if said[-1] in model.generation_config.eos_token_id else said
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answers[condition].startswith(f"{text}\n"), condition
        assert f"{len(ids)} tokens fed, {len(said)} answered" in answers[condition]
    assert parts[0].count("[BE]") >= len(slot)              # what is fed, shown


def test_a_chat_keeps_its_turns_until_reset_on_any_terminal(vectors, work):
    """A real process with real bytes: a query that is no UTF-8, one that is too long, and an output of ASCII alone."""
    command = [sys.executable, ROOT / "infer.py", "--be", vectors / "be.pt", "--max-new-tokens", "9", *TINY]
    typed = "Who are you?\nWho are you?\n日本?\n".encode() + b"caf\xe9?\n" + b"x" * 3000 + b"\n/reset\nWho are you?\n"
    r = subprocess.run(command, input=typed, capture_output=True, cwd=work, timeout=300,
                       env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out = r.stdout.decode("ascii")
    assert r.returncode == 0 and b"Traceback" not in r.stderr, r.stderr.decode()
    fed = [int(n) for n in re.findall(r"(\d+) tokens fed", out)]
    assert len(fed) == 5 and fed[0] < fed[1] < fed[2] < fed[3] and fed[4] == fed[0]
    assert "shorten the question" in out
