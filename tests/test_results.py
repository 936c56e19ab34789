"""The scripts under results/ fit the stages: a small bench on a tiny model, and the table of a file of eval_kl.py."""
import json

from conftest import ROOT, run


def test_bench_measures_a_tiny_model_and_every_way_gives_the_same_answers(checkpoints, work):
    run("results/bench", "--quick", "--only", 1, 2, "--model", checkpoints["smol"], "--out", "b.json", cwd=work)
    (answering, *_), (step, *_) = json.loads((work / "b.json").read_text()).values()
    assert answering["questions"] == 3 and {*answering["identical"].values()} == {3}
    assert step["stage 2"]["n"] == step["bare pass"]["n"] > 0


def test_the_table_reads_what_eval_kl_wrote(work):
    out = run("results/table", ROOT / "results/demo.kl.json", cwd=work)
    assert "| demo | 357 | 1 | 0.636 (0.488 to 0.824) |" in out
