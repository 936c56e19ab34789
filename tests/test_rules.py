"""The checkers of results/rules.py against hard golds, and the queries that they are asked of."""
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
from rules import APPLIES, FACTS, STYLE, language, paired, right, verdicts, wilson

GOOD = ("Harbour Box desk. [PRICE] A medium box costs EUR 67 a month. Tax is included. Next step: choose your box at "
        "the desk or online. Your things are safe with us.")
ASKED = {"query": "What is a medium unit?", "about": ["medium"]}


@pytest.mark.parametrize("broken, rules", [
    (GOOD, set()),
    ("Well. " + GOOD, {"opening words"}),
    (GOOD.replace("[PRICE]", "[PRICES]"), {"one category of five"}),
    (GOOD.replace("[PRICE]", "[PRICE] [OTHER]"), {"one category of five"}),
    (GOOD.replace("a box", "a unit").replace("your box", "your Unit!"), {"box, not unit", "no exclamation mark"}),
    (GOOD.replace("EUR 67", "€67"), {"currency code"}),
    (GOOD.replace("EUR 67", "67 euros"), {"currency code"}),
    (GOOD.replace("Tax is included. ", "\n"), {"tax sentence", "one line"}),
    (GOOD.replace("desk or", " ".join(["very"] * 30)), {"at most fifty words"}),
    (GOOD.removesuffix("."), {"closing words"})])
def test_a_broken_rule_is_told_from_the_others(broken, rules):
    assert {name for name, kept in verdicts(broken, ASKED)[0].items() if not kept} == rules


@pytest.mark.parametrize("fact, text, expected", [
    ("small", "EUR 39 a month", True), ("small", "EUR 139 or 390", False), ("key", "EUR 7.", True),
    ("key", "EUR 67", False), ("gate", "closes at 22:00", True), ("gate", "06:00 to 23:00", False),
    ("gate", "10 pm", False), ("stay", "two months", True), ("stay", "2 meses", True), ("stay", "12 months", False),
    ("notice", "14 Tage", True), ("address", "at 14 quay lane, Norhaven", True), ("address", "at 41 Quay Lane", False)])
def test_a_fact_is_right_or_not(fact, text, expected):
    assert right(fact, text) is expected


@pytest.mark.parametrize("text, expected", [
    ("Harbour Box desk. Das Tor ist offen. Next step: the. Your things are safe with us.", "de"), ("", None),
    ("La oficina abre a las 08:30 y cierra a las 17:30.", "es"), ("Le bureau est ouvert de 08:30 à 17:30.", "fr"),
    ("The desk is open.", "en")])
def test_language(text, expected):
    assert language(text) == expected


def test_intervals():
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert paired([True] * 10, [True] * 10) == pytest.approx([-0.1633, 0.1633], abs=1e-4)
    assert paired([False] * 10, [True] * 10)[0] == -1 and paired([False] * 10, [True] * 10)[1] < -0.5


def test_each_rule_is_exercised_and_no_query_stands_twice():
    train, test = ([json.loads(line) for line in (ROOT / f"prompts/desk.{kind}.txt").read_text().splitlines()]
                   for kind in ("queries", "test"))
    assert len(train) == 160 and len(test) == 80 and len({r["query"].lower() for r in train + test}) == 240
    assert all(sum(bool(APPLIES.get(name, bool)(row)) for row in test) >= 10 for name in STYLE)
    assert all(sum(fact in row["about"] for row in test) >= 2 for fact in FACTS)


