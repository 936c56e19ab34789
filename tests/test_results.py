"""The scripts under results/ fit the stages: a small bench on a tiny model, and the table of a file of eval_kl.py."""
import json

from conftest import ROOT, run


def test_bench_measures_an_item_on_a_tiny_model(checkpoints, work):
    (work / "q.txt").write_text("Is it late?\nWho sells bread?\nWhere is the reef?\nWhat is 18 - 7?\n")
    run("results/bench", "--quick", "--only", 1, 2, "--model", checkpoints["smol"], "--out", "b.json", cwd=work)
    rows = json.loads((work / "b.json").read_text())
    assert rows["teacher"] and rows["step_speed"]


def test_the_table_reads_what_eval_kl_wrote(work):
    out = run("results/table", ROOT / "results/demo.kl.json", cwd=work).stdout
    assert "| demo | 357 | 1 | 0.634 (0.486 to 0.823) |" in out
