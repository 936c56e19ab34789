"""Killed, broken off, resumed: the same vector to the last bit. Real processes on a tiny model, in fp32 on the CPU; what they have done is read from their own progress bar, never from a clock.

    SIGKILL             nothing is saved; --resume goes on from the last save
    SIGINT, SIGTERM     the step is finished and saved, exit codes 130 and 143; --resume goes on from that very step
    NaN, inf            in a loss or a gradient: the step is skipped; the third in a row ends the run, with exit code 1 and the last good vector saved
"""
import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from test_cli import TINY, fill, same

SAVE = 4                                                                    # steps between two saves
RUNS = {                                                                    # stage: (script, module, arguments, steps)
    "0": ("stage0_ae.py", "ae", ["--data", "corpus.jsonl", "--eval-every", SAVE, "--held-out", 2, "--lr", 0.1], 32),
    "1": ("stage1_recon.py", "recon", ["--prompt", "p.txt", "--ae", "ae.pt", "--save-every", SAVE, "--lr", 0.1, "--k", 2], 60),
    "2": ("stage2_kd.py", "kd", ["--prompt", "p.txt", "--ae", "ae.pt", "--be", "be.pt", "--eval-every", SAVE, "--batch", 4, "--answer-tokens", 6, "--lr", 0.1], 60),
    "2, lambda 1": ("stage2_kd.py", "kd", ["--prompt", "p.txt", "--init", "random", "--lam", 1, "--k", 2, "--eval-every", SAVE, "--batch", 4, "--answer-tokens", 6, "--lr", 0.1], 60),
}
SLOW = ["0", "1", "2"]


@pytest.fixture(scope="module")
def folder(checkpoints, owner, scripts, tmp_path_factory):
    """The texts, an [AE] and a [BE] of stage 1, for the tied Llama."""
    folder = fill(tmp_path_factory.mktemp("kill"))
    scripts.ae.save_artifact(folder / "ae.pt", {"kind": "ae", "vector": torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) / 10, "model": owner, "layout": "chat"})
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(sys, "argv", ["stage1_recon.py", "--model", str(checkpoints["smol"]), *TINY, "--prompt", "p.txt", "--ae", "ae.pt", "--steps", "4", "--out", "be.pt"])
        scripts.recon.main()
    return folder


@pytest.fixture(scope="module")
def run(folder, checkpoints):
    """run(stage, out, *more, kill=None) -> the process's end. kill (signal, step): the signal is sent when the progress bar has shown that step."""
    def go(stage, out, *more, kill=None):
        script, _, arguments, steps = RUNS[stage]
        command = [sys.executable, "-u", ROOT / script, "--model", checkpoints["smol"], *TINY, *arguments, "--steps", steps, "--out", out, *more]
        environment = os.environ | {"TQDM_MININTERVAL": "0"}                # every step is shown
        p = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        err, shown = b"", -1
        while chunk := os.read(p.stderr.fileno(), 65536):
            err += chunk
            shown = max([shown, *(int(n) for n, total in re.findall(rb"\[[AB]E\][^|]*\|[^|]*\| (\d+)/(\d+)", err) if int(total) == steps)])
            if kill and shown >= kill[1]:
                p.send_signal(kill[0])
                kill = None
        out, code = p.stdout.read().decode(), p.wait()
        p.stdout.close(), p.stderr.close()
        return SimpleNamespace(code=code, out=out, err=err.decode(), shown=shown)
    return go


def load(folder, out):
    return torch.load(folder / out, weights_only=True)


@pytest.fixture(scope="module")
def whole(run, folder):
    """stage -> the artifact of a run in one go, each made once."""
    made = {}

    def get(stage):
        if stage not in made:
            r = run(stage, f"whole-{stage[0]}/x.pt")
            assert r.code == 0 and r.shown == RUNS[stage][3], r.err[-2000:]
            made[stage] = load(folder, f"whole-{stage[0]}/x.pt")
        return made[stage]
    return get


@pytest.mark.slow
@pytest.mark.parametrize("stage", SLOW)
def test_the_same_command_twice_gives_the_same_artifact(stage, run, whole, folder):
    assert run(stage, f"again-{stage}/x.pt").code == 0
    assert same(load(folder, f"again-{stage}/x.pt"), whole(stage))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before the first save", "early", "in the middle", "late"])
@pytest.mark.parametrize("stage", SLOW)
def test_sigkill_at_a_random_step(stage, where, run, whole, folder):
    steps, rng = RUNS[stage][3], random.Random(f"{stage} {where}")
    low, high = {"before the first save": (0, 1), "early": (SAVE + 1, steps // 3), "in the middle": (steps // 3, steps // 2), "late": (steps // 2, steps - 2 * SAVE)}[where]
    out, at = f"killed-{stage}-{where.split()[-1]}/x.pt", rng.randint(low, high)
    r = run(stage, out, kill=(signal.SIGKILL, at))
    assert r.code == -signal.SIGKILL, f"step {at} was not killed, the run ended with {r.code}: {r.err[-300:]}"
    resume = []
    if low > SAVE:
        assert SAVE <= load(folder, out)["step"] < steps and load(folder, out)["step"] % SAVE == 0
    if (folder / out).exists():
        resume = ["--resume"]
    r = run(stage, out, *resume)
    assert r.code == 0, r.err[-2000:]
    resumed = load(folder, out)
    assert torch.equal(resumed["vector"], whole(stage)["vector"]) and torch.equal(resumed["last"], whole(stage)["last"]) and resumed["history"] == whole(stage)["history"]


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("stage", SLOW)
def test_a_signal_finishes_the_step_and_saves_it(stage, name, code, run, whole, folder):
    """At a step between two saves, twice in one run: what was done is saved, nothing is done twice, and the end is the same."""
    steps, rng = RUNS[stage][3], random.Random(f"{stage} {name}")
    out, resume, done = f"{name}-{stage}/x.pt", [], 0
    for low, high in ((1, steps // 4), (steps // 3, steps // 2)):
        at = rng.randint(max(low, done + 1), max(high, done + 1))
        r = run(stage, out, *resume, kill=(getattr(signal, name), at))
        assert r.code == code and "Traceback" not in r.err, f"{r.code} after {name} at step {at}: {r.err[-600:]}"
        saved = load(folder, out)
        assert at <= saved["step"] < steps, "the step was not saved"
        assert saved["step"] in (r.shown, r.shown + 1), f"step {r.shown} was shown, {saved['step']} is saved"
        assert "--resume" in r.err + r.out                                  # it says how to go on
        resume, done = ["--resume"], saved["step"]
    r = run(stage, out, "--resume")
    assert r.code == 0, r.err[-2000:]
    resumed = load(folder, out)
    assert torch.equal(resumed["vector"], whole(stage)["vector"]) and torch.equal(resumed["last"], whole(stage)["last"])
    assert len(resumed["history"]) >= len(whole(stage)["history"])


# --- NaN and inf, in this process

@pytest.fixture
def poisoned(folder, checkpoints, scripts, command, monkeypatch):
    """poisoned(stage, steps, how, out) -> a run in which the loss of each of those steps is NaN or inf, or is finite with a gradient of NaN."""
    def go(stage, bad, how, out):
        _, name, arguments, _ = RUNS[stage]
        module, true_loss, calls = getattr(scripts, name), getattr(scripts, name).token_loss, []
        passes = 2 if stage == "0" else 1                                   # losses a step: stage 0 has two forward passes, stage 2 with lambda 1 has no L_recon

        def token_loss(*a, **k):
            loss = true_loss(*a, **k)
            if not loss.requires_grad:
                return loss                                                 # a measurement, no step
            calls.append(None)
            if (len(calls) - 1) // passes in bad:
                if how == "gradient":
                    loss.register_hook(lambda g: g * float("nan"))
                else:
                    loss = loss * float(how)
            return loss
        monkeypatch.chdir(folder)
        with monkeypatch.context() as m:
            m.setattr(module, "token_loss", token_loss)
            r = command(module, "--model", checkpoints["smol"], *TINY, *arguments, "--steps", 16, "--out", out)
        return r, len(calls) // passes, load(folder, out)
    return go


STAGES = ["0", "1", "2, lambda 1"]


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_is_skipped_and_counted(stage, how, poisoned):
    """One alone, and two in a row."""
    r, steps, artifact = poisoned(stage, {5, 9, 10}, how, f"skip-{stage[0]}-{how}/x.pt")
    assert r.code == 0 and steps == 16 and artifact["step"] == 16, r.err[-600:]
    said = [line for line in re.split(r"[\r\n]+", r.out + r.err) if "skipped" in line]
    assert len(said) == 3 or any(re.search(r"\b3\b", line) for line in said), said
    assert artifact["vector"].isfinite().all() and artifact["last"].isfinite().all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_moves_nothing(stage, poisoned, folder, scripts, checkpoints, command, monkeypatch):
    """The vector and the optimizer after a bad step are those before it. The last step is the bad one: the vector is that of the step before."""
    _, name, _, _ = RUNS[stage]
    seen, save = [], getattr(scripts, name).save_artifact
    monkeypatch.setattr(getattr(scripts, name), "save_artifact", lambda path, a: (seen.append((a["step"], a["last"].clone())), save(path, a)))
    r, _, _ = poisoned(stage, {14, 15}, "nan", f"still-{stage[0]}/x.pt")
    assert r.code == 0, r.err[-600:]
    end = [last for step, last in seen if step == 16][-1]
    monkeypatch.setitem(RUNS, stage, (*RUNS[stage][:2], [2 if before in ("--eval-every", "--save-every") else a for before, a in zip(["", *RUNS[stage][2]], RUNS[stage][2])], RUNS[stage][3]))
    seen.clear()
    r, _, _ = poisoned(stage, (), "nan", f"moved-{stage[0]}/x.pt")
    assert r.code == 0 and torch.equal(end, [last for step, last in seen if step == 14][-1]) and not torch.equal(end, [last for step, last in seen if step == 16][-1])


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_third_bad_step_in_a_row_ends_the_run(stage, how, poisoned):
    r, steps, artifact = poisoned(stage, {2, 9, 10, 11, 12, 13}, how, f"third-{stage[0]}-{how}/x.pt")
    assert r.code == 1 and "Traceback" not in r.err and steps == 12, (r.code, steps, r.err[-600:])
    lines = re.findall(rf"{RUNS[stage][0]}: ([^\r\n]+)", r.err)
    assert len(lines) == 1 and "--lr" in lines[0] and re.search(r"\bsteps? .*\b1[12]\b", lines[0]) and f"third-{stage[0]}" in lines[0], lines or r.err[-300:]
    assert artifact["vector"].isfinite().all() and artifact["last"].isfinite().all()
