"""results/turns.py reads the tables of controls as stage 2 prints them."""
from types import SimpleNamespace

import pytest

from conftest import ROOT, load_script


def test_it_reads_each_row_of_each_table():
    turns = load_script("results/turns")
    printed = (ROOT / "results/demo.txt").read_text(encoding="utf-8")
    one, two = turns.tables(printed + printed.replace(" test queries", " held-out queries"))
    assert one == two and list(one) == ["full prompt", "[BE]", "no prompt (empty slot)", "no system block at all", "default system prompt", "random vector", "prompt cut to 1 token"]
    for row in one.values():
        assert row["n"] > 1 and row["gap_closed"] == pytest.approx(1 - row["kl"] / one["no prompt (empty slot)"]["kl"], abs=1e-3)
        assert row["gap_closed_95"][0] <= row["gap_closed"] <= row["gap_closed_95"][1]
    lines = turns.report([{"trained_on": 1, "steps": 4, "turns": [one, two]}]).splitlines()
    assert len(lines) == 4 and "turn 2" in lines[3] and f"{one['[BE]']['gap_closed']:.3f} (" in lines[3]


def test_one_query_has_no_interval(scripts, capsys):
    turns = load_script("results/turns")
    row = {"kl": 0.3, "top1": 0.5, "gap_closed": 0.4, "gap_closed_95": [0.4, 0.4], "tokens": 20, "n": 1, "answer_tokens": 9}
    scripts.kd.report(SimpleNamespace(prompt=["p.txt"], turns=1, steps=0), SimpleNamespace(path="p.txt", test_queries=["q"]), [{"full prompt": row, "[BE], 1 vector": row, "no prompt (empty slot)": row}], 0)
    printed = capsys.readouterr().out
    table, = turns.tables(printed)
    assert "0.400 to" not in printed and list(table) == ["full prompt", "[BE]", "no prompt (empty slot)"] and table["[BE]"]["gap_closed"] == 0.4
    assert "| turn 1 | 0.400 | 1 |" in turns.report([{"trained_on": 1, "steps": 4, "turns": [table]}])
