"""results/ablations.sh: a small grid from its own command line, on a tiny model; what it skips and what it refuses."""
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, SENTENCES

ROWS = "full kd memory tuning-teacher block cut"


@pytest.fixture
def grid(scripts, checkpoints, owner, tmp_path):
    """grid(NAME=value, ...) runs the script for one prompt and one seed -> the finished process."""
    scripts.ae.save_artifact(tmp_path / "ae.pt", {"kind": "ae", "vector": torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) / 10, "model": owner, "layout": "chat"})
    (tmp_path / "shop.txt").write_text(f"{SENTENCES[0]}. {SENTENCES[1]}.")
    for name, part in (("queries", SENTENCES[2:8]), ("test", SENTENCES[8:11])):
        (tmp_path / f"shop.{name}.txt").write_text("".join(f"{s}?\n" for s in part))

    def run(**settings):
        env = {"PYTHON": sys.executable, "MODEL": checkpoints["smol"], "AE": tmp_path / "ae.pt", "OUT": tmp_path / "runs", "README": tmp_path / "table/README.md", "STEPS": 4, "SEEDS": 0, "QUERIES": 6, "TESTS": 2,
               "PROMPTS": tmp_path / "shop.txt", "LENGTHS": "", "GOLD": "", "ROWS": ROWS, "STAGE1": "--dtype fp32", "STAGE2": "--dtype fp32 --answer-tokens 4 --batch 4 --eval-every 2"}
        (tmp_path / "table").mkdir(exist_ok=True)
        return subprocess.run([ROOT / "results/ablations.sh"], env=os.environ | {k: str(v) for k, v in (env | settings).items()}, capture_output=True, text=True)
    return run


@pytest.mark.slow
def test_the_rows_have_one_budget_and_one_teacher_and_are_not_run_again(grid, tmp_path):
    r = grid()
    assert r.returncode == 0, r.stderr
    table = (tmp_path / "table/README.md").read_text()
    for row, steps in {"full": "1 + 3", "kd": "0 + 4", "memory": "4 + 0", "tuning-teacher": "0 + 4", "block": "1 + 3", "cut-2": "0 + 0", "cut-4": "0 + 0"}.items():
        assert f"\n| {row} | {steps} | " in table
    runs = {p.name.split(".")[1]: torch.load(p, weights_only=True) for p in (tmp_path / "runs").glob("shop.*.s0.pt")}
    assert len(runs) == 7 and len(list((tmp_path / "runs").glob("teacher-*.jsonl"))) == 1
    assert {(name, a["layout"], a["config"]["lam"], a["config"]["hard"]) for name, a in runs.items() if a["config"]["lr"] != 0} == {
        ("full", "chat", 0.9, False), ("kd", "chat", 1.0, False), ("tuning-teacher", "chat", 1.0, True), ("block", "block", 0.9, False)}
    assert {name: sum("L_KD" in h or "L_CE" in h for h in a["history"]) for name, a in runs.items() if a["config"]["lr"] != 0} == {"full": 3, "kd": 4, "tuning-teacher": 4, "block": 3}
    assert len({round(a["metrics"]["controls"]["default system prompt"]["kl"], 5) for a in runs.values()}) == 1      # nothing of [BE] or of the layout is in it
    assert not list((tmp_path / "runs").glob("*.part.*"))

    again = grid()
    assert again.returncode == 0 and "$ " not in again.stdout and (tmp_path / "table/README.md").read_text() == table
    (tmp_path / "runs/shop.kd.s0.pt").unlink()                                                     # the table keeps a finished run; the grid makes it again
    again = grid()
    assert again.returncode == 0 and again.stdout.count("$ ") == 1 and (tmp_path / "table/README.md").read_text() == table
    for where, settings in (("OUT:", {}), ("README:", {"OUT": tmp_path / "other"})):                # the runs, and the rows that the table keeps
        other = grid(STEPS=5, **settings)
        assert other.returncode == 2 and where in other.stderr and "STEPS=4" in other.stderr and "STEPS=5" in other.stderr and len(other.stderr.splitlines()) == 1


def test_an_argument_starts_nothing(tmp_path):
    r = subprocess.run([ROOT / "results/ablations.sh", "--help"], env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "runs")}, capture_output=True, text=True)
    assert r.returncode == 2 and "found '--help'" in r.stderr and len(r.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("settings, said", [({"ROWS": "full half"}, "ROWS: there is no row half"), ({"SEEDS": "0 one"}, "SEEDS: expected whole numbers, found 'one'"), ({"STEPS": 1}, "STEPS: expected a whole number from 2, found '1'"),
                                            ({"PROMPTS": "none.txt"}, "none.txt is not there"), ({"PYTHON": "nowhere/python"}, "no nowhere/python")])
def test_a_mistake_is_told_in_one_line(grid, tmp_path, settings, said):
    r = grid(**settings)
    assert r.returncode == 2 and said in r.stderr and len(r.stderr.splitlines()) == 1 and not list(tmp_path.glob("runs/*.pt"))
