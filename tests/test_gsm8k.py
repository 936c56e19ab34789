"""eval_gsm8k.py and data/gsm8k/prepare.py: the scorer, the statistics, batched generation against the plain loop, resumed runs, and bad input."""
import importlib.util
import json
import random
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, SENTENCES, load_script

SHARED = next((folder for p in ROOT.parents if (folder := p / "shared/data/gsm8k").exists()), ROOT.parent / "shared/data/gsm8k")
TURNS = [{"role": "user", "content": "How many apples are left if Anna has 18 apples and gives 7 of them away?"},
         {"role": "assistant", "content": "She has 18 - 7 = 11 apples. The final answer is 11"}]


@pytest.fixture(scope="module")
def gsm():
    return load_script("eval_gsm8k")


# --- the scorer

@pytest.mark.parametrize("text, expected", [
    ("2,125", ["2125"]), ("1,450,000.00", ["1450000"]), ("-3", ["-3"]), ("\u22123", ["-3"]), ("18.00", ["18"]), ("18.", ["18"]), ("0.50", ["0.5"]), (".5", ["0.5"]), ("007", ["7"]), ("-0.0", ["0"]),
    ("$1,000", ["1000"]), ("-$3", ["-3"]), ("$-3", ["-3"]), ("$ 12", ["12"]), ("\\$1{,}000", ["1000"]), ("1\\,000", ["1000"]), ("\\boxed{-3}", ["-3"]), ("\u20ac5", ["5"]), ("**18**", ["18"]), ("25%.", ["25"]),
    ("18kg", ["18"]), ("16-3", ["16", "3"]), ("16 - 3 = 13", ["16", "3", "13"]), ("16 -3", ["16", "3"]), ("(16)-3", ["16", "3"]), ("1,2,3", ["1", "2", "3"]), ("10, 20 and 30.", ["10", "20", "30"]),
    ("5**2", ["5", "2"]), ("100 " + "1" * 60, ["100", "1" * 60]), ("no number at all", []), ("", [])])
def test_numbers_of_a_text(gsm, text, expected):
    assert gsm.numbers(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("She has 18 - 7 = 11 apples. The final answer is 11", "11"),
    ("The final answer is 11. The final answer is -$1,012.50, which is 3 more.", "-1012.5"),                # the last marker, the first number behind it
    ("the FINAL answer is: **$18.00**", "18"), ("The final answer is $\\boxed{-18}$.", "-18"), ("The final answer is 25% of 80", "25"),
    ("So it is 40 dollars, or 41 with tax", "41"), ("We get 12. The final answer is unknown", "12"),        # else the last of the text
    ("The final answer is", None), ("eighteen", None), ("", None)])
def test_the_number_that_an_answer_gives(gsm, text, expected):
    assert gsm.predict(text) == expected


@pytest.mark.parametrize("answer, expected", [
    ("3 * 5 = <<3*5=15>>15\n#### 2,125", "2125"), ("#### -3", "-3"), ("#### 18.00", "18"), ("#### $1,000", "1000"), ("####109,200,000 ", "109200000"), ("#### -$1,000", "-1000"), ("7\n#### 0", "0"),
    ("#### 1\n#### 2", "2"), ("7 apples\n#### none", None), ("it is 7", None), ("", None)])
def test_hard_golds(gsm, answer, expected):
    assert gsm.read_gold(answer) == expected


@pytest.mark.parametrize("split", ["test", "train"])
def test_every_gold_of_the_real_data_is_the_number_behind_the_mark(gsm, split):
    if not (SHARED / f"{split}.jsonl").exists():
        pytest.skip("no GSM8K beside this checkout")
    rows = [json.loads(line) for line in (SHARED / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    questions = gsm.read_questions(SHARED, split)
    assert len(questions) == len(rows) > 900
    for row, (question, gold) in zip(rows, questions):
        assert question == row["question"].strip() and float(gold) == float(row["answer"].split("####")[1].replace(",", ""))
        assert gsm.predict(f"It is 5. The final answer is ${row['answer'].split('####')[1].strip()}.00 in all 7 cases") == gold       # and an answer that spells it otherwise is right
        assert gsm.numbers(row["answer"])[-1] == gold                                                      # nothing stands behind it


def test_the_wording_is_the_prompts_own(gsm):
    turns = [m["content"] for m in json.loads((ROOT / "prompts/gsm8k_8shot.json").read_text())["messages"] if m["role"] == "user"]
    pattern = re.escape(gsm.WORDING).replace(re.escape("{question}"), "[A-Z].*[?.]")
    assert len(turns) == 8 and all(re.fullmatch(pattern, turn) for turn in turns)
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data/gsm8k/prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    assert prepare.WORDING == gsm.WORDING


# --- the statistics

@pytest.mark.parametrize("k, n, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)])
def test_wilson_against_newcombe_1998(gsm, k, n, low, high):
    assert gsm.wilson(k, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("lost, won, p", [(0, 0, 1), (4, 4, 1), (0, 5, 0.0625), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 15, 2 * 21700 / 2 ** 20)])
def test_mcnemar_is_the_exact_binomial_test(gsm, lost, won, p):
    assert gsm.mcnemar(lost, won) == pytest.approx(p, rel=1e-12)
    assert 0 <= gsm.mcnemar(700, 600) < 0.01                                                                # 2 ** 1300 does not overflow


def test_the_bootstrap_over_counts_is_the_one_over_questions(gsm):
    differences, rng = np.array([-1] * 30 + [1] * 12 + [0] * 158), np.random.default_rng(1)
    naive = np.quantile(differences[rng.integers(200, size=(20_000, 200))].mean(1), [0.025, 0.975])
    assert gsm.bootstrap(30, 12, 200) == pytest.approx(naive, abs=0.006)
    assert gsm.bootstrap(0, 0, 50) == (0, 0)


def test_the_table_of_hand_made_rows(gsm):
    def rows(right, number="1"):
        return [{"correct": r, "predicted": number if r else None, "cut": not r, "context_tokens": 10, "new_tokens": 4, "seconds": 0.5} for r in right]
    table = gsm.summarise({"full prompt": rows([1, 1, 1, 1, 0]), "be": rows([1, 1, 0, 0, 1]), "no prompt": rows([0] * 5)})
    be = table["be"]
    assert (be["accuracy"], be["n"], be["no_number"], be["cut"], be["full_alone"], be["it_alone"], be["retention"]) == (0.6, 5, 2, 2, 2, 1, 0.75)
    assert be["minus_full"] == pytest.approx(-0.2) and be["mcnemar_p"] == 1 and be["minus_full_95"][0] < -0.2 < be["minus_full_95"][1]
    assert table["full prompt"]["retention"] == 1 and table["no prompt"]["accuracy_95"][0] == 0
    assert gsm.summarise({"full prompt": rows([0, 0]), "be": rows([1, 0])})["be"]["retention"] is None     # 1 / 0 is not shown as a number
    text = gsm.show(table).splitlines()
    assert len(text) == 4 and len(set(map(len, text))) == 1 and "75.0%" in text[2] and "-20.0%" in text[2]


# --- generation

def plain(model, embed, ids, learned, stop, limit):
    """Greedy, one row, the whole context in each step, no cache."""
    said = []
    while len(said) < limit and not (said and said[-1] in stop):
        said.append(model(inputs_embeds=embed(model, torch.tensor([ids + said]), learned), use_cache=False).logits[0, -1].argmax().item())
    return said


@torch.no_grad()
def test_a_batch_over_the_shared_prefix_equals_the_plain_loop_row_by_row(gsm, loaded):
    _, model, tokenizer = loaded
    torch.manual_seed(0)
    learned = torch.randn(2, 64) * 0.1
    rows = [gsm.layout_ids(tokenizer, "chat", [-1, -2], [{"role": "user", "content": s}]) for s in SENTENCES[:4]]
    common = min(next(i for i, (a, b) in enumerate(zip(rows[0], row)) if a != b) for row in rows[1:])       # the words of the template and the slots
    rows += [rows[0][:common] + torch.randint(10, 500, (n,)).tolist() for n in (1, 2, 9, 30, 31)]           # ends that differ, so that the answers do
    rows.append(rows[0][:common] + [-2] + rows[0][-9:])                                                     # and a slot behind the prefix
    free = [plain(model, gsm.embed, row, learned, set(), 12) for row in rows]

    def cut(stop):
        return [f[:next((i + 1 for i, token in enumerate(f) if token in stop), 12)] for f in free]
    stop = max(({a, b} for a in sum(free, []) for b in free[0]), key=lambda stop: len({len(w) for w in cut(stop)}))
    want = cut(stop)
    assert len({len(w) for w in want}) > 2 and -1 in rows[0][:common]                                       # rows end at different times
    for shared in (common, 5, 1):
        prefix = model.get_decoder()(inputs_embeds=gsm.embed(model, torch.tensor([rows[0][:shared]]), learned), use_cache=True).past_key_values
        assert gsm.generate(model, rows, shared, prefix, learned, stop, 12) == want
        assert [gsm.generate(model, [row], shared, prefix, learned, stop, 12)[0] for row in rows] == want   # and the prefix is as it was
        assert prefix.get_seq_length() == shared and prefix.layers[0].keys.shape[0] == 1


# --- the command line

@pytest.fixture
def folder(gsm, owner, scripts, tmp_path, monkeypatch):
    """A working folder: a dialogue, seven questions, two artifacts of the tiny model, chat.pt (k 1) and block.pt (k 2)."""
    monkeypatch.chdir(tmp_path)
    prompt = {"messages": TURNS}
    (tmp_path / "p.json").write_text(json.dumps(prompt))
    write_questions(tmp_path, [f"1,00{i}" for i in range(7)])
    sha = scripts.kd.hashlib.sha256(json.dumps(TURNS).encode()).hexdigest()
    for i, layout in enumerate(["chat", "block"]):
        scripts.kd.save_artifact(f"{layout}.pt", {"kind": "be", "stage": "kd", "vector": torch.randn(i + 1, 64, generator=torch.Generator().manual_seed(i)) * 0.3, "layout": layout,
                                                  "prompt": {"sha256": sha, "messages": TURNS, "tokens": 40}, "model": owner})
    return tmp_path


def write_questions(folder, golds):
    (folder / "test.jsonl").write_text("".join(json.dumps({"question": f"{s}?", "answer": f"1 + 1 = 2\n#### {g}"}) + "\n" for s, g in zip(SENTENCES, golds)))


ARGS = ["--prompt", "p.json", "--data", ".", "--be", "chat.pt", "block.pt", "--batch", 3, "--max-new-tokens", 10, "--dtype", "fp32", "--device", "cpu", "--out", "run/gsm8k.jsonl"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]


def test_a_name_stands_for_one_condition(gsm, folder, command):
    """A vector in a file named as a condition of the table's own, or as another vector's, goes by its path."""
    for name in ("full prompt.pt", "run/chat.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy("chat.pt", name)
    run = command(gsm, *ARGS, "--n", 1, "--be", "chat.pt", "full prompt.pt", "run/chat.pt", "block.pt")
    assert run.code == 0, run.err
    assert list(json.loads(Path("run/gsm8k.json").read_text())["table"]) == ["full prompt", "chat.pt", "full prompt.pt", "run/chat.pt", "block", "no prompt"]


def test_a_run_writes_its_rows_and_its_table(gsm, folder, smol, command):
    run = command(gsm, *ARGS, "--bare")
    assert run.code == 0, run.err
    out, tokenizer = folder / "run/gsm8k.jsonl", smol[1]
    rows, summary = rows_of(out), json.loads((folder / "run/gsm8k.json").read_text())
    names = ["full prompt", "chat", "block", "no prompt", "no system block"]
    assert list(summary["table"]) == names and len(rows) == 7 * 5 and len({r["key"] for r in rows}) == 35 and "note:" not in run.out
    assert [r["condition"] for r in rows[:15]] == [name for name in names for _ in range(3)]                # a batch of questions in all conditions, then the next
    assert all(re.search(rf"^{name} .*%", run.out, re.M) for name in names)
    turn = [{"role": "user", "content": gsm.WORDING.format(question=f"{SENTENCES[4]}?")}]
    fed = {"full prompt": gsm.chat_ids(tokenizer, TURNS + turn), "chat": gsm.layout_ids(tokenizer, "chat", [-1], turn), "block": gsm.layout_ids(tokenizer, "block", [-1, -2], turn),
           "no prompt": gsm.chat_ids(tokenizer, turn), "no system block": gsm.layout_ids(tokenizer, "block", [], turn)}
    for name, ids in fed.items():
        row = next(r for r in rows if r["condition"] == name and r["question"] == 4)
        assert row["context_tokens"] == len(ids) and row["gold"] == "1004"
        learned = torch.load(folder / f"{name}.pt", weights_only=True)["vector"] if name in ("chat", "block") else torch.zeros(1, 64)
        said = plain(smol[0], gsm.embed, ids, learned, {tokenizer.eos_token_id}, 10)
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip() and row["new_tokens"] == len(said)

    # nothing to make the second time, and the answers are scored anew, whatever verdict stands in the file
    right = {"full prompt": [1, 2, 3, 4], "chat": [0, 1, 2], "block": [1, 2, 3, 4], "no prompt": [], "no system block": [6]}
    for row in rows:
        q = row["question"]
        row["answer"] = f"It is 5. The final answer is ${1000 + q:,}.00" if q in right[row["condition"]] else "I do not know" if q == 5 else "The final answer is 17"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = command(gsm, *ARGS, "--bare")
    table = json.loads((folder / "run/gsm8k.json").read_text())["table"]
    assert "35 answers found, 0 to make" in again.out and rows_of(out) == rows
    assert {name: t["correct"] for name, t in table.items()} == {name: len(r) for name, r in right.items()}
    assert [t["retention"] for t in table.values()] == [1, 0.75, 1, 0, 0.25] and {t["no_number"] for t in table.values()} == {1} and {t["n"] for t in table.values()} == {7}
    assert (table["chat"]["full_alone"], table["chat"]["it_alone"]) == (2, 1) and "75.0%" in again.out


def test_a_killed_run_goes_on_to_the_same_file(gsm, folder, command):
    out = folder / "run/gsm8k.jsonl"
    assert command(gsm, *ARGS).code == 0
    whole, rows, table = out.read_bytes(), timeless(out), json.loads((folder / "run/gsm8k.json").read_text())["table"]
    ends = [m.end() for m in re.finditer(b"\n", whole)]
    for size in (0, 3, ends[1], ends[4] + 40, ends[13] + 1, len(whole) - 1):                                # between batches, within one, within a line
        out.write_bytes(whole[:size])
        run = command(gsm, *ARGS)
        assert f"{sum(e <= size for e in ends)} answers found" in run.out and timeless(out) == rows
    again = json.loads((folder / "run/gsm8k.json").read_text())["table"]
    assert [{k: v for k, v in t.items() if k != "seconds"} for t in again.values()] == [{k: v for k, v in t.items() if k != "seconds"} for t in table.values()]


def test_stale_rows_do_not_count(gsm, folder, scripts, checkpoints, command):
    assert command(gsm, *ARGS, "--n", 2).code == 0
    assert "8 answers found, 20 to make" in command(gsm, *ARGS).out                                         # more questions: the first are there
    assert "0 answers found, 28 to make; 28 rows" in command(gsm, *ARGS, "--dtype", "bf16").out
    be = torch.load(folder / "chat.pt", weights_only=True)
    scripts.kd.save_artifact("chat.pt", be | {"vector": be["vector"] + 0.01})
    assert "21 answers found, 7 to make; 35 rows" in command(gsm, *ARGS).out                                # another vector
    (folder / "p.json").write_text(json.dumps({"messages": TURNS[:1] + [{"role": "assistant", "content": "11"}]}))
    run = command(gsm, *ARGS)
    assert "21 answers found, 7 to make; 42 rows" in run.out and "chat.pt was made for another prompt" in run.out       # another full prompt
    assert len(rows_of(folder / "run/gsm8k.jsonl")) == 70
    assert json.loads((folder / "run/gsm8k.json").read_text())["table"]["chat"]["n"] == 7


def test_another_limit_makes_only_the_answers_that_it_changes(gsm, folder, command):
    """An answer that ended by itself within both limits counts under both; a run with a larger limit gives what a fresh one gives."""
    out = folder / "run/gsm8k.jsonl"
    def run(limit):
        text = command(gsm, *ARGS, "--max-new-tokens", limit).out
        return int(re.search(r"(\d+) to make", text)[1]), json.loads((folder / "run/gsm8k.json").read_text())["table"]
    assert run(10)[0] == 28
    short = rows_of(out)
    for row in short[::2]:                                                                                  # a tiny model seldom ends by itself: let half of them have ended
        row |= {"cut": False, "new_tokens": 7}
    out.write_text("".join(json.dumps(row) + "\n" for row in short))
    left = sum(r["cut"] for r in short)
    assert 0 < left <= 14 and run(10)[0] == 0 and run(14)[0] == left and run(14)[0] == 0 and run(10)[0] == 0 and len(rows_of(out)) == 28 + left
    assert run(6)[0] == 28                                                                                  # none of them fits in 6
    out.write_text("".join(json.dumps(row) + "\n" for row in rows_of(out) if row["new_tokens"] != 7))
    made, table = run(14)
    out.unlink()
    assert made == 28 - left and {name: (t["correct"], t["cut"]) for name, t in run(14)[1].items()} == {name: (t["correct"], t["cut"]) for name, t in table.items()}


def test_artifacts_of_one_name_and_none_at_all(gsm, folder, checkpoints, command):
    (folder / "b").mkdir()
    (folder / "b/chat.pt").write_bytes((folder / "block.pt").read_bytes())
    command(gsm, *ARGS, "--n", 1, "--be", "chat.pt", "b/chat.pt")
    assert list(json.loads((folder / "run/gsm8k.json").read_text())["table"]) == ["full prompt", "chat.pt", "b/chat.pt", "no prompt"]
    run = command(gsm, *ARGS, "--n", 1, "--be", "--model", checkpoints["smol"])
    assert "2 answers found, 0 to make" in run.out and list(json.loads((folder / "run/gsm8k.json").read_text())["table"]) == ["full prompt", "no prompt"]


# --- bad input

@pytest.mark.parametrize("change, word", [
    (["--data", "nowhere"], "python data/gsm8k/prepare.py"), (["--split", "train"], "train.jsonl"), (["--n", 0], "found 0"), (["--n", "many"], "--n"), (["--be", "no.pt"], "no.pt: not there"),
    (["--be", "p.json"], "not a whole artifact"), (["--be", "chat.pt", "--model", "OTHER"], "another model"), (["--out", "rows.json"], "ends in .jsonl"), (["--out", "test.jsonl"], "left as it is"),
    (["--out", "notes.jsonl"], "left as it is"), (["--out", "p.json/rows.jsonl"], "cannot be written"), (["--prompt", "no.json"], "no.json"), (["--max-new-tokens", 1000], "at most 24 tokens"),
    (["--data", "bad"], "line 2"), (["--data", "goldless"], "line 1"), (["--data", "empty"], "no questions")])
def test_bad_input_is_said_in_one_line_and_nothing_is_written(gsm, folder, checkpoints, command, change, word):
    (folder / "notes.jsonl").write_text("notes of someone")
    good = (folder / "test.jsonl").read_text()
    for name, text in {"bad": good.split("\n")[0] + '\n{"question": "?"}\n', "goldless": '{"question": "?", "answer": "It is 7"}\n', "empty": "\n"}.items():
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text(text)
    def files():
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}
    before = files()
    run = command(gsm, *ARGS, *[checkpoints["qwen"] if c == "OTHER" else c for c in change])
    assert run.code == 2 and run.err.count("\n") == 1 and word in run.err and "Traceback" not in run.err
    assert files() == before


# --- data/gsm8k/prepare.py

@pytest.fixture
def prepare(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path / "out"), *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "data/gsm8k/prepare.py"), run_name="__main__")
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run


def gsm8k_rows(n):
    rng = random.Random(n)
    return [{"question": f"What is {i} \u2019 plus?", "answer": f"easy\n#### {rng.choice(['-3', '2,125', '18.00', '$1,000', '7'])}"} for i in range(n)]


def test_prepare_checks_a_folder_and_copies_it(gsm, prepare, tmp_path, scripts):
    rows = {"train": gsm8k_rows(9), "test": gsm8k_rows(5)}
    for split in rows:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r | {"extra": 1}) + "\n" for r in rows[split]))
    run = prepare("--from", tmp_path, "--queries", 4)
    assert run.code == 0 and "5 rows, a part of GSM8K's 1319" in run.out
    assert rows_of(tmp_path / "out/train.jsonl") == rows["train"] and rows_of(tmp_path / "out/test.jsonl") == rows["test"]
    assert gsm.read_questions(tmp_path / "out", "test") == [(r["question"], gsm.read_gold(r["answer"])) for r in rows["test"]]
    assert list(scripts.kd.read_queries(tmp_path / "out/queries.jsonl")) == [gsm.WORDING.format(question=r["question"]) for r in rows["train"][:4]]
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for bad, word in [('{"question": "?", "answer": "It is 7"}', "test, row 6"), ("[]", "test, row 6"), ("{", "test.jsonl")]:
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows["test"]) + bad + "\n")
        run = prepare("--from", tmp_path)
        assert run.code == 2 and run.err.count("\n") == 1 and word in run.err
    run = prepare("--from", tmp_path / "nowhere")
    assert run.code == 2 and "train.jsonl cannot be read" in run.err
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_prepare_asks_the_hub_for_both_splits(prepare, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return gsm8k_rows({"train": 7473, "test": 1319}[split])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    run = prepare()
    assert run.code == 0 and asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")] and "test.jsonl: 1319 rows\n" in run.out
    assert len(rows_of(tmp_path / "out/train.jsonl")) == 7473 and len(rows_of(tmp_path / "out/queries.jsonl")) == 1000
    monkeypatch.setitem(sys.modules, "datasets", None)
    run = prepare()
    assert run.code == 2 and "pip install datasets" in run.err
