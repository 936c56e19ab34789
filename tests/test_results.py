"""What makes the committed numbers, results/: the checkers of rules against hard golds, and a small bench."""
import json

import pytest

from conftest import ROOT, run, script

rules = script("results/rules")

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
    run("results/bench", "--quick", "--only", 1, 2, "--model", checkpoints["smol"], "--out", "b.json", cwd=work)
    (answering, *_), (step, *_) = json.loads((work / "b.json").read_text()).values()
    assert answering["questions"] == 3 and {*answering["identical"].values()} == {3}
    assert step["stage 2"]["n"] == step["bare pass"]["n"] > 0
