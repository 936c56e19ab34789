"""results/table.py on handmade runs."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, load_script


@pytest.fixture
def table():
    return load_script("results/table")


def run(folder, name, gap, k=1, steps=300, **more):
    """A finished run of 7 queries of one answer token each: KL 1 without a prompt, 1 - gap with [BE], a little more or less from query to query."""
    def row(closed):
        wave = [0.01 * (i - 3) for i in range(7)] if closed else [0] * 7
        return {"gap_closed": closed, "kl": 1 - closed, "top1": 0.5, "n": 7, "answer_tokens": 7, "kl_by_query": [1 - closed + w for w in wave]}
    controls = {key: row(value) for key, value in [("full prompt", 0.99), (f"[BE], {k} vector", gap), ("no prompt (empty slot)", 0.0), ("no system block at all", 0.1),
                                                   ("default system prompt", 0.2), ("random vector", 0.01), ("prompt cut to 1 token", 0.02)]}
    torch.save({"vector": torch.zeros(k, 4), "prompt": {"tokens": 40}, "history": [{"step": s, "held-out KL": 1 / (s + 1)} for s in (1, 2)], "config": {"model": "models/smol", "steps": steps, "lr": 0.1},
                "metrics": {"controls": controls}} | more, folder / f"{name}.pt")


def test_rows_are_means_over_seeds_and_say_how_many_runs_they_are(table, tmp_path):
    for name, gap, k in [("pirate.full.s0", 0.4, 1), ("pirate.full.s1", 0.6, 1), ("shop.full.s0", 0.2, 1), ("pirate.k-4.s0", 0.8, 4), ("pirate.lam-50.s0", 0.3, 1)]:
        run(tmp_path, name, gap, k)
    run(tmp_path, "pirate.kd.s0", 0.9, metrics={})                           # not finished
    run(tmp_path, "pirate.base.s0.recon", 0.9)                               # stage 1's
    runs = table.read_runs(tmp_path)
    assert [(r["prompt"], r["row"], r["seed"]) for r in runs] == [("pirate", "full", 0), ("pirate", "full", 1), ("pirate", "k-4", 0), ("pirate", "lam-50", 0), ("shop", "full", 0)]
    text = table.report(runs)
    pirate, shop = text.split("## pirate")[1].split("## shop")
    line = next(x for x in pirate.split("\n") if x.startswith("| full |"))
    assert line.startswith("| full | 0 + 300 | 1 | 0.500 (") and line.endswith("| 0.500 | 50.0% | 7 | 2 |")
    assert "| full | 0 + 300 | 1 | 0.200 (" in shop and "k-4" not in shop.split("##")[0]
    assert "full prompt 0.990; no prompt (empty slot) 0.000; no system block at all 0.100; default system prompt 0.200; random vector 0.010; prompt cut to 1 token 0.020" in pirate
    assert table.plots(runs, tmp_path) == ["ablations-k.png", "ablations-lambda.png", "ablations-curves.png"]        # one length only: no plot of it
    assert all((tmp_path / f"ablations-{n}.png").read_bytes()[:4] == b"\x89PNG" for n in ("k", "lambda", "curves"))


def test_the_steps_of_stage_1_count_from_wherever_the_table_is_made(table, tmp_path, monkeypatch):
    """The runs name stage 1's artifact relative to the repository; it stands in their own folder. One that is gone is no run of 0 steps."""
    run(tmp_path, "pirate.base.s0.recon", 0.0, steps=25)
    run(tmp_path, "pirate.full.s0", 0.4, config={"model": "models/smol", "steps": 75, "lr": 0.1, "be": ["out/ablations/pirate.base.s0.recon.pt"]})
    monkeypatch.chdir("/")
    assert [r["steps"] for r in table.read_runs(tmp_path)] == ["25 + 75"]
    (tmp_path / "pirate.base.s0.recon.pt").unlink()
    with pytest.raises(SystemExit):
        table.read_runs(tmp_path)


def test_a_difference_is_of_the_prompts_and_seeds_that_both_rows_have(table, tmp_path):
    for name, gap in [("pirate.full.s0", 0.4), ("pirate.full.s1", 0.9), ("shop.full.s0", 0.2), ("bank.full.s0", 0.9), ("pirate.kd.s0", 0.5), ("shop.kd.s0", 0.5)]:
        run(tmp_path, name, gap)
    runs = table.read_runs(tmp_path)
    mean, low, high, seeds = table.difference(runs, "full", "kd")            # pirate -0.1, shop -0.3
    assert mean == pytest.approx(-0.2) and low <= mean <= high < 0 and seeds == 1
    assert table.difference(runs, "full", "kd", "bank") is None and table.difference(runs, "full", "recon") is None
    text = table.report(runs)
    assert "| reconstruction with [AE] adds to KD | full - kd | -0.200 (-0.200 to -0.200) | pirate -0.100 (-0.100 to -0.100), shop -0.300 (-0.300 to -0.300) | does not hold here, on a single seed |" in text
    assert "| KD adds to reconstruction with [AE] | full - recon |  |  | cannot tell: not run |" in text


def test_a_verdict_needs_the_whole_interval(table):
    assert table.verdict((0.1, 0.01, 0.2, 3)) == "holds here" and table.verdict((-0.1, -0.2, -0.01, 3)) == "does not hold here"
    assert table.verdict((0.1, -0.01, 0.2, 3)) == "cannot tell: the interval holds 0" == table.verdict((-0.1, -0.2, 0.01, 3))
    assert table.verdict((0.1, 0.01, 0.2, 3), [(0.4, 0.3, 0.5, 3), (-0.2, -0.3, -0.1, 3)]) == "cannot tell: the prompts disagree"
    assert table.verdict((0.1, 0.01, 0.2, 3), [(0.4, 0.3, 0.5, 3), (-0.2, -0.5, 0.1, 3)]) == "holds here"
    assert table.verdict((0.3, 0.04, 0.6, 3), [(0.6, -0.1, 1.3, 3), (-0.1, -0.12, -0.09, 3)]) == "cannot tell: the prompts disagree"      # the mean and one prompt
    assert table.verdict((0.1, 0.01, 0.2, 1)) == "holds here, on a single seed"


def test_runs_over_other_teacher_answers_are_not_compared(table, tmp_path):
    """As many answer tokens, but another KL of the default system prompt: the answers were others."""
    run(tmp_path, "pirate.full.s0", 0.4)
    run(tmp_path, "pirate.kd.s0", 0.5)
    runs = table.read_runs(tmp_path)
    assert table.difference(runs, "full", "kd")[0] == pytest.approx(-0.1)
    table.control(runs[1], "default system prompt")["kl"] *= 1.05
    assert table.difference(runs, "full", "kd") is None


def test_the_deviation_between_seeds_is_pooled_over_the_rows_that_have_several(table, tmp_path):
    for name, gap in [("pirate.full.s0", 0.4), ("pirate.full.s1", 0.6), ("shop.kd.s0", 0.1), ("shop.kd.s1", 0.2), ("shop.kd.s2", 0.3), ("shop.full.s0", 0.9)]:
        run(tmp_path, name, gap)
    deviation, rows = table.seed_deviation(table.read_runs(tmp_path))        # (0.02 + 2 * 0.01) / 3, in variances times their degrees of freedom
    assert rows == 2 and deviation == pytest.approx((0.04 / 3) ** 0.5)
    assert "standard deviation of 0.115, pooled over 2 rows" in table.report(table.read_runs(tmp_path))
    assert table.seed_deviation([]) is None


def test_the_interval_is_of_seeds_and_queries(table):
    rng = np.random.default_rng(0)
    bottom = np.ones((1, 50))
    one = table.interval([(rng.normal(0.5, 0.1, (1, 50)), bottom)])
    assert one[1] < one[0] < one[2] and one[2] - one[1] == pytest.approx(2 * 1.96 * 0.1 / 50 ** 0.5, rel=0.4)
    seeds = table.interval([(np.array([[0.1] * 50, [0.9] * 50]), np.ones((2, 50)))])                     # queries alike, seeds apart
    assert seeds[0] == pytest.approx(0.5) and seeds[2] - 0.5 == pytest.approx(12.71 * 0.4, rel=0.1) and 0.5 - seeds[1] == pytest.approx(12.71 * 0.4, rel=0.1)     # Student's t of one degree of freedom
    three = table.interval([(np.array([[0.4] * 50, [0.5] * 50, [0.6] * 50]), np.ones((3, 50)))])
    assert three[2] - three[0] == pytest.approx(4.303 * 0.1 / 3 ** 0.5, rel=0.1)


def test_a_text_without_a_seed_is_compared_with_every_seed(table, tmp_path):
    for name, gap in [("pirate.full.s0", 0.4), ("pirate.full.s1", 0.6), ("pirate.cut-2.s0", 0.9)]:
        run(tmp_path, name, gap)
    runs = table.read_runs(tmp_path)
    assert table.difference(runs, "full", "cut-2")[3] == 1                   # trained, as all else: the seed that both have
    runs = [r | {"steps": "0 + 0"} if r["row"] == "cut-2" else r for r in runs]
    for x, sign in ((table.difference(runs, "full", "cut-2"), -1), (table.difference(runs, "cut-2", "full"), 1)):
        assert x[0] == pytest.approx(sign * 0.4) and x[3] == 2


def test_a_damaged_run_is_one_line(tmp_path):
    (tmp_path / "pirate.full.s0.pt").write_bytes(b"not a run")
    r = subprocess.run([sys.executable, ROOT / "results/table.py", "--runs", tmp_path, "--out", tmp_path / "x.md"], capture_output=True, text=True)
    assert r.returncode == 2 and "damaged" in r.stderr and len(r.stderr.splitlines()) == 1 and not (tmp_path / "x.md").exists()


def test_no_runs_is_one_line(tmp_path):
    r = subprocess.run([sys.executable, ROOT / "results/table.py", "--runs", tmp_path, "--out", tmp_path / "x.md"], capture_output=True, text=True)
    assert r.returncode == 2 and "results/ablations.sh" in r.stderr and len(r.stderr.splitlines()) == 1 and not (tmp_path / "x.md").exists()


def test_the_table_stays_when_the_runs_are_gone_and_grows_with_new_ones(table, tmp_path):
    """ablations.jsonl keeps what the table is made of; a run made again takes the old one's place; runs of other settings are refused before anything is written."""
    def make(*runs, settings="STEPS=4"):
        folder = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, gap in runs:
            run(folder, name, gap)
        (folder / "settings.txt").write_text(f"{settings}\n")
        return subprocess.run([sys.executable, ROOT / "results/table.py", "--runs", folder, "--out", tmp_path / "made/table.md"], capture_output=True, text=True)

    def made():
        return {f.name: f.read_bytes() for f in (tmp_path / "made").iterdir()}
    (tmp_path / "made").mkdir()
    assert make(("pirate.full.s0", 0.4), ("pirate.kd.s0", 0.5)).returncode == 0
    first = made()
    assert set(first) == {"table.md", "ablations.jsonl", "ablations-curves.png"} and b"STEPS=4 results/ablations.sh" in first["table.md"]
    empty = subprocess.run([sys.executable, ROOT / "results/table.py", "--runs", tmp_path / "nothing", "--out", tmp_path / "made/table.md"], capture_output=True, text=True)
    assert empty.returncode == 0 and {k: v for k, v in made().items() if k[-3:] != "png"} == {k: v for k, v in first.items() if k[-3:] != "png"}
    r = make(("shop.full.s0", 0.1), settings="STEPS=9")
    assert r.returncode == 2 and "STEPS=9" in r.stderr and len(r.stderr.splitlines()) == 1 and made()["table.md"] == first["table.md"]
    (tmp_path / "bare").mkdir()
    run(tmp_path / "bare", "pirate.full.s0", 0.9)                                                     # of no known settings
    r = subprocess.run([sys.executable, ROOT / "results/table.py", "--runs", tmp_path / "bare", "--out", tmp_path / "made/table.md"], capture_output=True, text=True)
    assert r.returncode == 2 and "no settings.txt" in r.stderr and made()["ablations.jsonl"] == first["ablations.jsonl"]
    assert make(("pirate.full.s1", 0.6), ("pirate.kd.s0", 0.9)).returncode == 0
    runs = [json.loads(x) for x in made()["ablations.jsonl"].splitlines()]
    assert [(r["row"], r["seed"], table.control(r)["gap_closed"]) for r in runs] == [("full", 0, 0.4), ("full", 1, 0.6), ("kd", 0, 0.9)]
    (tmp_path / "made/ablations.jsonl").write_bytes(first["ablations.jsonl"][:-40])
    r = make(("pirate.full.s1", 0.6))
    assert r.returncode == 2 and "ablations.jsonl" in r.stderr and len(r.stderr.splitlines()) == 1
