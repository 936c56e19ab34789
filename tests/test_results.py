"""What makes the committed numbers, results/: the judge against a client that is none, the checkers of rules against
hard golds, a small bench on a tiny model, the table of a file of eval_kl.py."""
import json
from types import SimpleNamespace

import pytest

from conftest import ROOT, run, script

rules = script("results/rules")

# what the judge says of a pair, by whether [BE]'s answer stands first
SAYS = {"won": lambda first: "A" if first else "B", "lost": lambda first: "B." if first else "**A**",
        "first": lambda first: "A", "half": lambda first: "TIE" if first else "B.",
        "thinks": lambda first: "<think>B?</think>\nA" if first else "b", "mute": lambda first: "Hard to say."}


def test_the_judge_hears_both_orders_and_its_verdicts_are_kept(work, monkeypatch):
    """Two equal answers are never sent; a verdict that is no A, B or TIE counts for neither."""
    openai, heard = pytest.importorskip("openai"), []

    def create(model, messages, **settings):
        text = messages[0]["content"]
        key = next(key for key in SAYS if f"question: {key}?" in text)
        heard.append(SAYS[key](text.index("mine") < text.index("theirs")))
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=heard[-1]))])
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    monkeypatch.setattr(openai, "OpenAI", lambda **settings: client)
    args = SimpleNamespace(judge_url="http://x/v1", judge_model="m", judge_options={"temperature": 0}, answers="out/r")
    triples = [(f"{key}?", "mine", "theirs") for key in SAYS] + [("same?", "equal", "equal")]
    for calls in (12, 0):
        heard.clear()
        counts = script("results/judge").judged(args, "Old Captain", "d", triples)
        assert counts == {"W": 3, "T": 2, "L": 1, "unparsable": 1, "both_orders": 3, "win_rate": (3 + 2 / 2) / 6}
        assert len(heard) == calls


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


@pytest.mark.parametrize("fact, text, expected", [
    ("small", "EUR 39 a month", True), ("small", "EUR 139 or 390", False), ("key", "EUR 67", False),
    ("gate", "closes at 22:00", True), ("gate", "06:00 to 23:00", False), ("gate", "10 pm", False),
    ("stay", "2 meses", True), ("stay", "12 months", False), ("notice", "14 Tage", True),
    ("address", "at 14 quay lane, Norhaven", True), ("address", "at 41 Quay Lane", False)])
def test_a_fact_is_right_or_not(fact, text, expected):
    assert rules.right(fact, text) is expected


@pytest.mark.parametrize("text, expected", [
    ("Harbour Box desk. Das Tor ist offen. Next step: the. Your things are safe with us.", "de"), ("", None),
    ("La oficina abre a las 08:30 y cierra a las 17:30.", "es"), ("Le bureau est ouvert de 08:30 à 17:30.", "fr"),
    ("The desk is open.", "en")])
def test_the_language_of_an_answer(text, expected):
    assert rules.language(text) == expected


def test_each_rule_is_exercised_no_query_stands_twice_and_a_difference_of_none_has_a_width():
    train, test = ([json.loads(line) for line in (ROOT / f"prompts/desk.{kind}.txt").read_text().splitlines()]
                   for kind in ("queries", "test"))
    assert len({r["query"].lower() for r in train + test}) == len(train) + len(test) == 240
    assert all(sum(bool(rules.APPLIES.get(name, bool)(row)) for row in test) >= 10 for name in rules.STYLE)
    assert all(sum(fact in row["about"] for row in test) >= 2 for fact in rules.FACTS)
    assert rules.paired([True] * 10, [True] * 10) == pytest.approx([-0.1633, 0.1633], abs=1e-4)


def test_bench_measures_a_tiny_model_and_every_way_gives_the_same_answers(checkpoints, work):
    run("results/bench", "--quick", "--only", 1, 2, "--model", checkpoints["smol"], "--out", "b.json", cwd=work)
    (answering, *_), (step, *_) = json.loads((work / "b.json").read_text()).values()
    assert answering["questions"] == 3 and {*answering["identical"].values()} == {3}
    assert step["stage 2"]["n"] == step["bare pass"]["n"] > 0


def test_the_table_reads_what_eval_kl_wrote(work):
    out = run("results/table", ROOT / "results/demo.kl.json", cwd=work)
    assert "| demo | 357 | 1 | 0.636 (0.488 to 0.824) |" in out
