"""The evaluations: scorers against hard golds, statistics against their sources, whole runs on tiny models."""
import json, re, shutil
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer

from conftest import PROMPT, ROOT, SENTENCES, TINY, load_tiny, main, opened, plain_greedy, plain_logits, script

SHORT = ["--max-new-tokens", 6, *TINY]
gsm, role, kl = script("eval_gsm8k"), script("eval_rolellm"), script("eval_kl")


# --- GSM8K: the scorer

@pytest.mark.parametrize("text, expected", [
    ("2,125", ["2125"]), ("1,450,000.00", ["1450000"]), ("-3", ["-3"]), ("\u22123", ["-3"]), ("18.", ["18"]),
    ("0.50", ["1/2"]), (".5", ["1/2"]), ("007", ["7"]), ("-0.0", ["0"]), ("$1,000", ["1000"]), ("-$3", ["-3"]),
    ("$-3", ["-3"]), ("\\$1{,}000", ["1000"]), ("1\\,000", ["1000"]), ("\\boxed{-3}", ["-3"]), ("**18**", ["18"]),
    ("25%.", ["25"]), ("18kg", ["18"]), ("16-3", ["16", "3"]), ("16 - 3 = 13", ["16", "3", "13"]), ("12 m²", ["12"]),
    ("1,2,3", ["1", "2", "3"]), ("10, 20 and 30.", ["10", "20", "30"]), ("1 000 000", ["1000000"]), ("2’000", ["2000"]),
    ("1'000", ["1000"]), ("1\u202f234,5", ["1234", "5"]), ("１２", ["12"]), ("１，０００", ["1000"]), ("3/4", ["3/4"]),
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
    ("The final answer is 1 000", 1000), ("The final answer is 1'000 apples", 1000), ("The final answer is １８", 18)])
def test_the_number_that_an_answer_gives(text, expected):
    assert gsm.predicted_number(text) == expected


# --- GSM8K: the statistics

def summary(right, full):
    rows = [{"predicted": 1 if r else None, "cut": not r, "context_tokens": 10, "new_tokens": 4, "seconds": 0.5}
            for r in right]
    return gsm.summarise(rows, right, full)


@pytest.mark.parametrize("k, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0)])
def test_the_interval_is_wilsons_as_in_newcombe_1998(k, n, low, high):
    right = [True] * k + [False] * (n - k)
    assert summary(right, right)["accuracy_95"] == pytest.approx([low, high], abs=6e-5)


@pytest.mark.parametrize("lost, won, p", [(0, 0, 1), (4, 4, 1), (0, 5, 0.0625), (1, 9, 22 / 1024), (9, 1, 22 / 1024),
                                          (5, 15, 2 * 21700 / 2 ** 20)])
def test_mcnemar_is_the_exact_binomial_test(lost, won, p):
    full, right = [True] * lost + [False] * (won + 3), [False] * lost + [True] * won + [False] * 3
    line = summary(right, full)
    assert line["mcnemar_p"] == pytest.approx(p, rel=1e-12) and (line["full_alone"], line["it_alone"]) == (lost, won)


def test_a_line_of_the_table():
    line = summary([1, 1, 0, 0, 1], [1, 1, 1, 1, 0])
    assert (line["accuracy"], line["n"], line["no_number"], line["cut"], line["retention"]) == (0.6, 5, 2, 2, 0.75)
    assert line["minus_full"] == pytest.approx(-0.2) and line["minus_full_95"][0] < -0.2 < line["minus_full_95"][1]
    assert summary([1, 0], [0, 0])["retention"] is None     # a ratio to nothing is not shown as a number


# --- GSM8K: whole runs

@pytest.fixture
def asked(work, vectors):
    """Five questions, and two artifacts of one prompt."""
    golds = [f"1,00{i}" for i in range(5)]
    rows = [{"question": f" {s}?", "answer": f"1 + 1 = 2\n#### {g}"} for s, g in zip(SENTENCES, golds)]
    (work / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("be", "block"):
        shutil.copy(vectors / f"{name}.pt", work)
    return ["--be", "be.pt", "block.pt", "--data", "test.jsonl", "--out", "g.jsonl", "--batch", 2, *SHORT]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_asks_in_every_condition_and_scores_what_is_kept(asked, work, smol):
    r = main("eval_gsm8k", *asked)
    assert r.code == 0, r.err
    rows, (model, tokenizer) = rows_of(work / "g.jsonl"), smol
    turns = [{"role": "user", "content": gsm.WORDING.format(question=f"{SENTENCES[3]}?")}]
    fed = {"full prompt": gsm.chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns),
           "be.pt": gsm.layout_ids(tokenizer, "chat", [-1], turns),
           "block.pt": gsm.layout_ids(tokenizer, "block", [-1, -2], turns), "no prompt": gsm.chat_ids(tokenizer, turns)}
    assert len(rows) == 20 and {row["condition"] for row in rows} == fed.keys()
    for name, ids in fed.items():
        learned = opened(name)["vector"] if name in ("be.pt", "block.pt") else torch.zeros(1, 64)
        row = next(row for row in rows if (row["condition"], row["question"]) == (name, 3))
        said = plain_greedy(model, ids, learned, 6)
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert (row["new_tokens"], row["context_tokens"]) == (len(said), len(ids))

    # answers given here are scored anew, and nothing is made
    right = {"full prompt": [1, 2, 3, 4], "be.pt": [0, 1, 2], "block.pt": [1, 2, 3, 4], "no prompt": []}
    for row in rows:
        good = row["question"] in right[row["condition"]]
        row["answer"] = f"It is 5. The final answer is ${1000 + row['question']:,}.00" if good else "It is 17"
    (work / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    r = main("eval_gsm8k", *asked)
    table = json.loads((work / "g.json").read_text())["table"]
    assert "0 answers to make" in r.out and rows_of(work / "g.jsonl") == rows
    assert {name: line["correct"] for name, line in table.items()} == {name: len(good) for name, good in right.items()}
    assert [line["retention"] for line in table.values()] == [1, 0.75, 1, 0]
    assert (table["be.pt"]["full_alone"], table["be.pt"]["it_alone"]) == (2, 1)


def test_a_killed_gsm8k_goes_on_and_stale_answers_do_not_count(asked, work, monkeypatch):
    assert main("eval_gsm8k", *asked).code == 0
    whole = [{key: row[key] for key in row if key != "seconds"} for row in rows_of(work / "g.jsonl")]
    (work / "g.jsonl").unlink()
    answer, left = gsm.answer, [5]

    def killed(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return answer(*args)
    with monkeypatch.context() as m:
        m.setattr(gsm, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            main("eval_gsm8k", *asked)
    assert 0 < len(rows_of(work / "g.jsonl")) < 20
    assert "12 answers to make" in main("eval_gsm8k", *asked).out
    assert [{key: row[key] for key in row if key != "seconds"} for row in rows_of(work / "g.jsonl")] == whole
    be = opened("be.pt")
    script("stage2_kd").save("be.pt", **be | {"vector": be["vector"] + 0.01})
    assert "5 answers to make" in main("eval_gsm8k", *asked).out                # of the other vector alone


@pytest.mark.parametrize("case, word", [({"test.jsonl": '{"question": "Why?", "answer": "it is 7"}\n'}, "test.jsonl"),
                                        ({"test.jsonl": ""}, "prepare.py"), ({"g.jsonl": "no rows\n"}, "g.jsonl")])
def test_what_is_no_gsm8k_is_refused(case, word, asked, work):
    for name, content in case.items():
        (work / name).write_text(content)
    r = main("eval_gsm8k", *asked)
    assert r.code == 2 and r.err.count("\n") == 1 and word in r.err


# --- KL

def test_eval_kl_measures_what_is_fed_against_plain_logits(vectors, work, smol):
    """Three test queries, one of which [BE] was trained on; the artifact of layout block with two vectors."""
    be, (model, tokenizer) = opened(vectors / "block.pt"), smol
    chats = [[{"role": "user", "content": text}] for text in ("Why is it cold?", "Who has the key?", "Trained on?")]
    (work / "p.test.txt").write_text("".join(f"{chat[0]['content']}\n" for chat in chats))
    history = [{"step": i, "L_KD": 2.0 - i} for i in range(2)] + [{"step": 1, "held-out KL": 0.5}]
    script("stage2_kd").save("be.pt", **be | {"config": {"prompt": "p.txt", "answer_tokens": 7}, "history": history,
                                              "trained_on": [chats[2]]})
    r = main("eval_kl", "--be", "be.pt", "--plot", "--out", "x.json", *TINY)
    assert r.code == 0, r.err
    controls, learned = json.loads((work / "x.json").read_text())["controls"], be["vector"]
    sums, tokens = {"[BE]": [0.0, 0], "no prompt": [0.0, 0], "default system prompt": [0.0, 0]}, 0
    for chat in chats[:2]:
        full = kl.chat_ids(tokenizer, be["messages"] + chat)
        said = plain_greedy(model, full, learned, 7)
        tokens += len(said)
        fed = {"full prompt": full, "[BE]": kl.layout_ids(tokenizer, "block", [-1, -2], chat),
               "no prompt": kl.layout_ids(tokenizer, "block", [], chat),
               "default system prompt": kl.chat_ids(tokenizer, chat)}
        logits = {name: plain_logits(model, ids + said, learned)[-len(said) - 1:-1] for name, ids in fed.items()}
        logp = {name: F.log_softmax(z, -1) for name, z in logits.items()}
        for name in sums:
            sums[name][0] += F.kl_div(logp[name], logp["full prompt"], log_target=True, reduction="sum").item()
            sums[name][1] += (logp[name].argmax(-1) == logp["full prompt"].argmax(-1)).sum().item()
    for name, (total, same) in sums.items():
        assert controls[name]["kl"] == pytest.approx(total / tokens, abs=1e-5) and controls[name]["kl"] > 0.01
        assert controls[name]["top1"] == pytest.approx(same / tokens)
        assert controls[name]["gap_closed"] == pytest.approx(1 - total / sums["no prompt"][0], abs=1e-4)
    assert abs(controls["full prompt"]["kl"]) < 1e-5 and controls["full prompt"]["top1"] == 1
    assert {"random vector", "prompt cut to k tokens"} < controls.keys() and controls["no prompt"]["gap_closed"] == 0
    for name, row in controls.items():
        assert re.search(rf"^{re.escape(name)} +-?{abs(row['kl']):.4f} ", r.out, re.M), name
        low, high = row["gap_closed_95"]
        assert low - 1e-6 <= row["gap_closed"] <= high + 1e-6
    assert "2 test queries; 1 left out" in r.out and (work / "x.png").read_bytes()[:4] == b"\x89PNG"


# --- RoleBench

ROLES = {"Old Captain": "A captain of few words. He says {aye}.", "Dr. T. Baker": "A baker.\nHe writes no price down."}


@pytest.fixture
def bench(work, vectors):
    """A RoleBench of two roles in its own layout, with questions that come twice, and an artifact for each."""
    for folder in ("profiles-eng", "rolebench-eng/instruction-generalization/role_specific"):
        (work / "bench" / folder).mkdir(parents=True)
    (work / "bench/profiles-eng/desc.json").write_text(json.dumps(ROLES | {"Nobody": "A role without questions."}))
    rows = [{"role": name, "question": f" {name}, what is  {x}? ", "generated": [f"It is {x}."]}
            for x in ("the reef", "3", "the reef") for name in ROLES]
    (work / "bench/rolebench-eng/instruction-generalization/role_specific/test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    (work / "mine").mkdir()
    for name in ROLES:
        shutil.copy(vectors / "be.pt", work / f"mine/{name.replace(' ', '_')}.pt")
    return ["--data", "bench", "--artifacts", "mine", "--out", "out/r", *SHORT]


def test_rouge_counts_words_of_any_writing():
    def rouge(reference, text):
        words = SimpleNamespace(tokenize=lambda text: role.WORD.findall(text.lower()))
        return RougeScorer(["rougeL"], tokenizer=words).score(reference, text)["rougeL"].fmeasure
    plain = RougeScorer(["rougeL"])
    for a, b in zip(SENTENCES, SENTENCES[1:]):              # in English as rouge-score has it
        assert rouge(a, b) == plain.score(a, b)["rougeL"].fmeasure
    assert rouge("我是船长，港口很冷。", "我是船长，海很冷。") > 0.7 and rouge("我是船长", "我是船长") == 1
    assert 0 < rouge("Капитан стар и мудр", "Капитан молод и глуп") < 1 and rouge("été naïve", "ete naive") == 0


def test_rolellm_goes_from_folder_to_table_and_goes_on_after_a_kill(bench, checkpoints, work):
    arguments = [*bench, "--model", checkpoints["smol"]]
    r = main("eval_rolellm", *arguments)
    assert r.code == 0, r.err
    data, rows = json.loads((work / "out/r.json").read_text()), rows_of(work / "out/r.answers.jsonl")
    assert [line["role"] for line in data["roles"]] == list(ROLES) and [line["n"] for line in data["roles"]] == [2, 2]
    assert len(rows) == 12 and {row["condition"] for row in rows} == {"full", "be", "none"}
    assert all(line["kl"] > 0 and 0 <= line["full"] <= 1 and not line.get("win_rate") for line in data["roles"])
    model, tokenizer = load_tiny(checkpoints, "smol")
    row = next(row for row in rows if (row["role"], row["condition"]) == ("Old Captain", "be"))
    ids = role.layout_ids(tokenizer, "chat", [-1], [{"role": "user", "content": row["question"]}])
    said = plain_greedy(model, ids, opened("mine/Old_Captain.pt")["vector"], 6)
    assert row["question"] == "Old Captain, what is the reef?"
    assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
    table, whole = (work / "out/r.md").read_text(), (work / "out/r.answers.jsonl").read_bytes()
    assert table in r.out and "| Old Captain | 2 |" in table
    (work / "out/r.answers.jsonl").write_bytes(whole[:-60])                     # killed within its last row
    assert main("eval_rolellm", *arguments).code == 0
    assert (work / "out/r.answers.jsonl").read_bytes() == whole and (work / "out/r.md").read_text() == table


def test_a_question_that_comes_twice_has_the_references_of_both(bench, work):
    file = work / "bench/rolebench-eng/instruction-generalization/role_specific/test.jsonl"
    more = {"role": "Old Captain", "question": "Old Captain, what is 3?", "generated": ["A number."]}
    file.write_text(file.read_text() + json.dumps(more) + "\n")
    args = SimpleNamespace(data="bench", artifacts="mine", roles=["Old Captain"], num_questions=None)
    questions = role.read_roles(args)["Old Captain"][2]
    assert questions["Old Captain, what is 3?"] == ["It is 3.", "A number."]


@pytest.mark.parametrize("extra, row, words", [
    (["--data", "nowhere"], None, ["nowhere", "python data/rolellm/prepare.py"]),
    (["--roles", "Jack Sparrow"], None, ["Jack Sparrow"]), (["--artifacts", "none"], None, ["none"]),
    ([], {"role": "Old Captain", "question": "Bare?", "generated": []}, ["Bare?"]),
    ([], {"role": "Old Captain", "question": "Bare?", "generated": None}, ["Bare?"])])
def test_what_is_no_rolebench_is_told_before_any_answer(extra, row, words, bench, checkpoints, work):
    file = work / "bench/rolebench-eng/instruction-generalization/role_specific/test.jsonl"
    file.write_text(file.read_text() + (json.dumps(row) + "\n" if row else ""))
    r = main("eval_rolellm", *bench, "--model", checkpoints["smol"], *extra)
    assert r.code == 2 and r.err.count("\n") == 1 and all(word in r.err for word in words), r.err
    assert not (work / "out/r.answers.jsonl").exists() or not (work / "out/r.answers.jsonl").read_text()


def test_the_judge_hears_both_orders_and_its_verdicts_are_kept(work, monkeypatch):
    """[BE]'s answer is good, bad, whatever stands first, or without a verdict; two equal answers are never sent."""
    openai, heard = pytest.importorskip("openai"), []
    says = {"won": lambda first: "A" if first else "B", "lost": lambda first: "B." if first else "**A**",
            "first": lambda first: "A", "half": lambda first: "TIE" if first else "B.",
            "thinks": lambda first: "<think>B?</think>\nA" if first else "b", "mute": lambda first: "Hard to say."}

    class Client:
        def __init__(self, **settings):
            self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

        def create(self, model, messages, **settings):
            text = messages[0]["content"]
            heard.append(text)
            key = next(key for key in says if f"question: {key}?" in text)
            content = says[key](text.index("mine") < text.index("theirs"))
            return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=content))])
    monkeypatch.setattr(openai, "OpenAI", Client)
    args = SimpleNamespace(judge_url="http://x/v1", judge_model="m", judge_options={"temperature": 0}, out="out/r")
    triples = [(f"{key}?", "mine", "theirs") for key in says] + [("same?", "equal", "equal")]
    for calls in (12, 0):
        heard.clear()
        counts = role.judged(args, "Old Captain", "d", triples)
        assert {key: counts[key] for key in ("W", "T", "L", "unparsable", "both_orders")} == {
            "W": 3, "T": 2, "L": 1, "unparsable": 1, "both_orders": 3}
        assert counts["win_rate"] == (3 + 2 / 2) / 6 and len(heard) == calls


# --- data

def test_the_questions_are_asked_in_the_prompts_own_words():
    messages = json.loads((ROOT / "prompts/gsm8k_8shot.json").read_text())["messages"]
    pattern = re.escape(gsm.WORDING).replace(re.escape("{question}"), "[A-Z].*[?.]")
    asked = [m["content"] for m in messages if m["role"] == "user"]
    assert len(asked) == 8 and all(re.fullmatch(pattern, text) for text in asked)
