"""The evaluations: scorers against hard golds, statistics against their sources, whole runs on tiny models; and what
makes the committed numbers, results/."""
import json, re, shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rouge_score.tokenizers import DefaultTokenizer

from conftest import (
    PROMPT, ROOT, SENTENCES, TINY, before, main, opened, plain_greedy, plain_measure, refused, run,
    script)

SHORT, SYSTEM = ["--max-new-tokens", 6, *TINY], [{"role": "system", "content": PROMPT}]
gsm, role, kl, rules = script("eval_gsm8k"), script("eval_rolellm"), script("eval_kl"), script("results/rules")


# --- GSM8K: the scorer and the statistics

@pytest.mark.parametrize("text, expected", [
    ("1,450,000.00", ["1450000"]), ("\u22123", ["-3"]), ("18.", ["18"]), (".5", ["1/2"]), ("007", ["7"]),
    ("-$3", ["-3"]), ("$-3", ["-3"]), ("\\$1{,}000", ["1000"]), ("1\\,000", ["1000"]), ("\\boxed{-3}", ["-3"]),
    ("25%.", ["25"]), ("18kg", ["18"]), ("16-3", ["16", "3"]), ("16 - 3 = 13", ["16", "3", "13"]), ("12 m²", ["12"]),
    ("1,2,3", ["1", "2", "3"]), ("10, 20 and 30.", ["10", "20", "30"]), ("1 000 000", ["1000000"]), ("2’000", ["2000"]),
    ("1\u202f234,5", ["1234", "5"]), ("１，０００", ["1000"]), ("3/4", ["3/4"]), ("**18**", ["18"]),
    ("100 " + "1" * 60, ["100", "1" * 60]), ("9" * 5000, ["9" * 5000]), ("no number", []), ("", [])])
def test_the_numbers_of_a_text(text, expected):
    assert gsm.numbers(text) == list(map(Fraction, expected))


@pytest.mark.parametrize("text, expected", [
    ("She has 18 - 7 = 11 apples. The final answer is 11", 11),
    ("The final answer is 11. The final answer is -$1,012.50, which is 3 more.", Fraction("-1012.5")),
    ("the FINAL answer is: **$18.00**", 18), ("The final answer is $\\boxed{-18}$.", -18),
    ("The final answer is 25% of 80", 25), ("So it is 40 dollars, or 41 with tax", 41),
    ("We get 12. The final answer is unknown", 12), ("The final answer is", None), ("eighteen", None), ("", None),
    ("<think>The final answer is 12</think>It is 15.", 15), ("<think>The final answer is 12", None),
    ("The final answer is 12</think>The final answer is 15", 15),
    ("The final answer is 12. As said, the final answer is what step 3 gave.", 12),
    ("The final answer is 30.00 - 2.00 = $28.00", 28), ("The final answer is 28. I had 30 - 2 = 28 of 40", 28),
    ("The final answer is 9 eggs * $2 = $18.", 18), ("The final answer is: 3 * 4 = 12", 12),
    ("The final answer is 1'000 apples", 1000), ("The final answer is １８", 18)])
def test_the_number_that_an_answer_gives(text, expected):
    assert gsm.predicted_number(text) == expected


def summary(right, full):
    rows = [{"predicted": 1 if r else None, "cut": not r, "context_tokens": 10, "new_tokens": 4, "seconds": 0.5}
            for r in right]
    return gsm.summarise(rows, right, full)


@pytest.mark.parametrize("k, n, low, high", [
    (81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)])
def test_the_interval_is_wilsons_as_in_newcombe_1998(k, n, low, high):
    right = [True] * k + [False] * (n - k)
    assert summary(right, right)["accuracy_95"] == pytest.approx([low, high], abs=6e-5)


@pytest.mark.parametrize("lost, won", [(0, 0), (4, 4), (0, 5), (9, 1)])
def test_a_line_of_the_table(lost, won):
    full, right, n = [True] * lost + [False] * (won + 3), [False] * lost + [True] * won + [False] * 3, lost + won + 3
    line = summary(right, full)
    low, high = line["minus_full_95"]
    assert (line["full_alone"], line["it_alone"]) == (lost, won)
    assert line["minus_full"] == (won - lost) / n and low <= line["minus_full"] <= high
    assert (line["accuracy"], line["n"], line["no_number"], line["cut"]) == (won / n, n, n - won, n - won)
    assert line["retention"] == (won / lost if lost else None)


# --- GSM8K: whole runs

def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_asks_in_every_condition_goes_on_after_a_kill_and_scores_what_is_kept(work, vectors, smol, monkeypatch):
    """Five questions, and two artifacts of one prompt."""
    write(work / "test.jsonl", [{"question": f" {s}?", "answer": f"1 + 1 = 2\n#### 1,00{i}"}
                                for i, s in enumerate(SENTENCES[:5])])
    for name in ("be.pt", "two.pt"):
        shutil.copy(vectors / name, work)
    asked = ["--be", "be.pt", "two.pt", "--data", "test.jsonl", "--out", "g.jsonl", "--batch", 2, *SHORT]
    answer, left = gsm.answer, [1, 2, 3, 4]

    def killed(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return answer(*args)
    with monkeypatch.context() as m:
        m.setattr(gsm, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            main("eval_gsm8k", *asked)
    assert len(rows_of(work / "g.jsonl")) == 8 and "12 answers to make" in main("eval_gsm8k", *asked).out
    rows, (model, tokenizer) = rows_of(work / "g.jsonl"), smol
    turns = [[{"role": "user", "content": gsm.WORDING.format(question=f"{s}?")}] for s in SENTENCES[:5]]
    fed = {"full prompt": [gsm.chat_ids(tokenizer, SYSTEM + t) for t in turns],
           "be.pt": [before(tokenizer, [-1], t) for t in turns],
           "two.pt": [before(tokenizer, [-1, -2], t) for t in turns],
           "no prompt": [gsm.chat_ids(tokenizer, t) for t in turns]}
    assert {(row["condition"], row["question"]) for row in rows} == {(name, i) for name in fed for i in range(5)}
    for row in rows:
        ids, name = fed[row["condition"]][row["question"]], row["condition"]
        said = plain_greedy(model, ids, opened(name if name in asked else "be.pt")["vector"], 6)
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert (row["new_tokens"], row["context_tokens"]) == (len(said), len(ids))

    # answers given here are scored anew, and nothing is made
    right = {"full prompt": [1, 2, 3, 4], "be.pt": [0, 1, 2], "two.pt": [1, 2, 3, 4], "no prompt": []}
    for row in rows:
        good = row["question"] in right[row["condition"]]
        row["answer"] = f"It is 5. The final answer is ${1000 + row['question']:,}.00" if good else "It is 17"
    write(work / "g.jsonl", rows)
    assert "0 answers to make" in main("eval_gsm8k", *asked).out and rows_of(work / "g.jsonl") == rows
    table = json.loads((work / "g.json").read_text())["table"]
    assert {name: line["correct"] for name, line in table.items()} == {name: len(good) for name, good in right.items()}
    assert [line["retention"] for line in table.values()] == [1, 0.75, 1, 0]
    assert (table["be.pt"]["full_alone"], table["be.pt"]["it_alone"]) == (2, 1)
    be = opened("be.pt")
    torch.save(be | {"vector": be["vector"] + 0.01}, "be.pt")
    assert "5 answers to make" in main("eval_gsm8k", *asked).out                # of the other vector alone


def test_eval_kl_measures_what_is_fed_against_plain_logits(vectors, work, smol):
    """Three test queries, one of which [BE] was trained on; the artifact of two vectors."""
    be, (model, tokenizer) = opened(vectors / "two.pt"), smol
    chats = [[{"role": "user", "content": text}] for text in ("Why is it cold?", "Who has the key?", "Trained on?")]
    (work / "p.test.txt").write_text("".join(f"{chat[0]['content']}\n" for chat in chats))
    torch.save(be | {"config": {"prompt": "p.txt", "answer_tokens": 7}, "trained_on": [chats.pop()]}, "be.pt")
    r = main("eval_kl", "--be", "be.pt", "--out", "x.json", *TINY)
    assert r.code == 0 and "2 test queries; 1 left out" in r.out, r.err
    controls = json.loads((work / "x.json").read_text())["controls"]
    fed = {"full prompt": [kl.chat_ids(tokenizer, SYSTEM + chat) for chat in chats],
           "[BE]": [before(tokenizer, [-1, -2], chat) for chat in chats],
           "no prompt": [before(tokenizer, [], chat) for chat in chats],
           "default system prompt": [kl.chat_ids(tokenizer, chat) for chat in chats]}
    plain = {name: plain_measure(model, fed["full prompt"], rows, be["vector"], 7) for name, rows in fed.items()}
    for name, (nats, same) in plain.items():
        assert (nats > 0.01) == (name != "full prompt")
        assert controls[name]["kl"] == pytest.approx(nats, abs=1e-5) and controls[name]["top1"] == pytest.approx(same)
        assert controls[name]["gap_closed"] == pytest.approx(1 - nats / plain["no prompt"][0], abs=1e-4)
    assert {"random vector", "prompt cut to k tokens"} < controls.keys()
    for name, row in controls.items():
        assert re.search(rf"^{re.escape(name)} +-?{abs(row['kl']):.4f} ", r.out, re.M), name
        low, high = row["gap_closed_95"]
        assert low - 1e-6 <= row["gap_closed"] <= high + 1e-6


# --- RoleBench

ROLES = {"Old Captain": "A captain of few words. He says {aye}.", "Dr. T. Baker": "A baker.\nHe writes no price down."}
ASKED = Path("bench/rolebench-eng/instruction-generalization/role_specific/test.jsonl")


def test_rouge_counts_words_of_any_writing():
    def words(text):
        return role.WORD.findall(text.lower())
    english = DefaultTokenizer(use_stemmer=False)
    assert all(words(s) == english.tokenize(s) for s in SENTENCES)              # in English as rouge-score has them
    assert words("我是船长，Капитан стар; été naïve") == [*"我是船长", "капитан", "стар", "été", "naïve"]


def test_rolellm_goes_from_folder_to_table_and_goes_on_after_a_kill(work, vectors, checkpoints, smol):
    """Two roles in RoleBench's own layout, and an artifact for each."""
    for folder in ("bench/profiles-eng", ASKED.parent, "mine"):
        (work / folder).mkdir(parents=True)
    (work / "bench/profiles-eng/desc.json").write_text(json.dumps(ROLES | {"Nobody": "A role without questions."}))
    write(ASKED, [{"role": name, "question": f" {name}, what is  {x}? ", "generated": [f"It is {x}, {i}."]}
                  for i, x in enumerate(["the reef", "3", "the reef"]) for name in ROLES])
    for name in ROLES:
        shutil.copy(vectors / "be.pt", work / f"mine/{name.replace(' ', '_')}.pt")
    args = SimpleNamespace(data="bench", artifacts="mine", roles=None, num_questions=None)
    assert role.read_roles(args)["Old Captain"][2] == {     # a question that comes twice has the references of both
        "Old Captain, what is the reef?": ["It is the reef, 0.", "It is the reef, 2."],
        "Old Captain, what is 3?": ["It is 3, 1."]}

    asked = ["--data", "bench", "--artifacts", "mine", "--out", "out/r", "--model", checkpoints["smol"], *SHORT]
    r = main("eval_rolellm", *asked)
    assert r.code == 0, r.err
    data, rows = json.loads((work / "out/r.json").read_text()), rows_of(work / "out/r.answers.jsonl")
    assert [line["role"] for line in data["roles"]] == list(ROLES) and [line["n"] for line in data["roles"]] == [2, 2]
    assert len(rows) == 16 and {row["condition"] for row in rows} == {"full", "be", "none", "default"}
    assert all(line["full_kl"] == 0 < line["be_kl"] and 0 <= line["full"] <= 1 for line in data["roles"])
    (model, tokenizer), chat = smol, [{"role": "user", "content": "Old Captain, what is the reef?"}]
    bare = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    for condition, ids in ("be", before(tokenizer, [-1], chat)), ("default", bare):
        row = next(row for row in rows if row["condition"] == condition)
        said = plain_greedy(model, ids, opened("mine/Old_Captain.pt")["vector"], 6)
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
    table, whole = (work / "out/r.md").read_text(), (work / "out/r.answers.jsonl").read_bytes()
    assert table in r.out and "| Old Captain | 2 |" in table
    (work / "out/r.answers.jsonl").write_bytes(b"".join(whole.splitlines(True)[:-3]))           # killed before the last
    assert main("eval_rolellm", *asked).code == 0
    assert (work / "out/r.answers.jsonl").read_bytes() == whole and (work / "out/r.md").read_text() == table

    refused(main("eval_rolellm", *asked, "--artifacts", "none"), "--artifacts none")
    write(ASKED, [*rows_of(ASKED), {"role": "Old Captain", "question": "Bare?", "generated": None}])
    refused(main("eval_rolellm", *asked), "Bare?")
    assert (work / "out/r.answers.jsonl").read_bytes() == whole


# --- results/

GOOD = ("Harbour Box desk. [PRICE] A medium box costs EUR 67 a month. Tax is included. Next step: choose your box at "
        "the desk or online. Your things are safe with us.")


@pytest.mark.parametrize("broken, broken_rules", [
    (GOOD, set()),
    ("Well. " + GOOD, {"opening words"}),
    (GOOD.replace("[PRICE]", "[PRICES]"), {"one category of five"}),
    (GOOD.replace("[PRICE]", "[PRICE] [OTHER]"), {"one category of five"}),
    (GOOD.replace("a box", "a unit").replace("your box", "your Unit!"), {"box, not unit", "no exclamation mark"}),
    (GOOD.replace("EUR 67", "67 euros"), {"currency code"}),
    (GOOD.replace("Tax is included. ", "\n"), {"tax sentence", "one line"}),
    (GOOD.replace("desk or", " ".join(["very"] * 30)), {"at most fifty words"}),
    (GOOD.removesuffix("."), {"closing words"})])
def test_a_broken_rule_is_told_from_the_others(broken, broken_rules):
    style, facts = rules.verdicts(broken, {"query": "What is a medium unit?", "about": ["medium"]})
    assert {name for name, kept in style.items() if not kept} == broken_rules and facts == {"medium": True}


@pytest.mark.parametrize("check, text, expected", [
    ("small", "EUR 39 a month", True), ("small", "EUR 139 or 390", False), ("gate", "closes at 22:00", True),
    ("gate", "06:00 to 23:00", False), ("stay", "2 meses", True), ("stay", "12 months", False),
    ("address", "at 14 quay lane, Norhaven", True), ("address", "at 41 Quay Lane", False),
    ("language", "La oficina abre a las 08:30 y cierra a las 17:30.", "es"), ("language", "The desk is open.", "en"),
    ("language", "Harbour Box desk. Das Tor ist offen. Next step: the.", "de"), ("language", "", None)])
def test_a_fact_is_right_or_not_and_a_language_is_told(check, text, expected):
    assert (rules.language(text) if check == "language" else rules.right(check, text)) is expected


def test_each_rule_is_exercised_no_query_stands_twice_and_a_difference_of_none_has_a_width():
    train, test = ([json.loads(line) for line in (ROOT / f"prompts/desk.{kind}.txt").read_text().splitlines()]
                   for kind in ("queries", "test"))
    assert len({r["query"].lower() for r in train + test}) == len(train) + len(test) == 240
    assert all(sum(bool(rules.APPLIES.get(name, bool)(row)) for row in test) >= 10 for name in rules.STYLE)
    assert all(sum(fact in row["about"] for row in test) >= 2 for fact in rules.FACTS)
    assert rules.paired([True] * 10, [True] * 10) == pytest.approx([-0.1633, 0.1633], abs=1e-4)


def test_bench_measures_a_tiny_model_and_every_way_gives_the_same_answers(checkpoints, work):
    asked = ["--quick", "--only", "teacher", "step", "--model", checkpoints["smol"], "--out", "b.json"]
    run("results/bench", *asked, cwd=work)
    (answering, *_), (step, *_) = json.loads((work / "b.json").read_text()).values()
    assert answering["questions"] == 3 and {*answering["identical"].values()} == {1}
    assert step["stage 2"]["n"] == step["bare pass"]["n"] > 0
