"""results/table.py on handmade runs."""
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, load_script


@pytest.fixture
def table():
    return load_script("results/table")


def run(folder, name, gap, k=1, **more):
    controls = {key: {"gap_closed": value, "n": 7} for key, value in [("full prompt", 0.99), (f"[BE], {k} vector", gap), ("no prompt (empty slot)", 0.0), ("no system block at all", 0.1),
                                                                       ("default system prompt", 0.2), ("random vector", 0.01), ("prompt cut to 1 token", 0.02)]}
    torch.save({"vector": torch.zeros(k, 4), "prompt": {"tokens": 40}, "history": [{"step": s, "held-out KL": 1 / (s + 1)} for s in (1, 2)], "metrics": {"controls": controls}} | more, folder / f"{name}.pt")


def test_rows_are_means_over_seeds_and_say_how_many_runs_they_are(table, tmp_path):
    for name, gap, k in [("pirate.full.s0", 0.4, 1), ("pirate.full.s1", 0.6, 1), ("shop.full.s0", 0.2, 1), ("pirate.k-4.s0", 0.8, 4), ("pirate.lam-50.s0", 0.3, 1)]:
        run(tmp_path, name, gap, k)
    run(tmp_path, "pirate.kd.s0", 0.9, metrics={})                           # not finished
    torch.save({"rows": []}, tmp_path / "teacher-0123.pt")
    run(tmp_path, "pirate.base.s0.recon", 0.9)                               # stage 1's
    runs = table.read_runs(tmp_path)
    assert [(r["prompt"], r["row"], r["seed"]) for r in runs] == [("pirate", "full", 0), ("pirate", "full", 1), ("pirate", "k-4", 0), ("pirate", "lam-50", 0), ("shop", "full", 0)]
    text = table.report(runs)
    assert "| full | 0.500 (0.400 to 0.600) | 0.200 | 0.400 (" in text and "| k-4 | 0.800 |  | 0.800 | 1 |" in text
    assert text.split("| full |")[1].split("\n")[0].endswith("| 3 |")
    assert "| shop | 7 | 0.990 | 0.000 | 0.100 | 0.200 | 0.010 | 0.020 |" in text
    assert table.plots(runs, tmp_path) == ["ablations-k.png", "ablations-lambda.png", "ablations-curves.png"]        # one length only: no plot of it
    assert all((tmp_path / f"ablations-{n}.png").read_bytes()[:4] == b"\x89PNG" for n in ("k", "lambda", "curves"))


def test_the_interval_holds_the_mean(table):
    low, high = table.interval([0.1, 0.2, 0.6]).split("(")[1].rstrip(")").split(" to ")
    assert table.interval([0.1, 0.2, 0.6]).startswith("0.300 (") and 0.1 <= float(low) < 0.3 < float(high) <= 0.6
    assert table.interval([0.25]) == "0.250"


def test_no_runs_is_one_line(tmp_path):
    r = subprocess.run([sys.executable, ROOT / "results/table.py", "--runs", tmp_path, "--out", tmp_path / "x.md"], capture_output=True, text=True)
    assert r.returncode == 2 and "results/ablations.sh" in r.stderr and len(r.stderr.splitlines()) == 1 and not (tmp_path / "x.md").exists()
