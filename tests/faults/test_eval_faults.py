"""The evaluations meet a full disk, a signal and SIGKILL through their own command lines: one line, the right exit code, every row that was written is whole, and the same command goes on to the same rows."""
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from test_cli import TINY

pytestmark = pytest.mark.slow
QUESTIONS = [{"question": f"Anna has {i} apples and gives 2 away. How many are left?", "answer": f"She has {i} - 2.\n#### {i - 2}"} for i in range(3, 11)]


@pytest.fixture
def work(owner, scripts, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    messages = [{"role": "system", "content": "Count the apples."}]
    (tmp_path / "p.json").write_text(json.dumps({"messages": messages}))
    scripts.kd.save_artifact(tmp_path / "be.pt", {
        "kind": "be", "stage": "kd", "vector": torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) / 10, "layout": "chat",
        "prompt": {"messages": messages, "tokens": 8}, "model": owner})
    return tmp_path


def start(work, wrapper=None, **kwargs):
    """eval_gsm8k.py over eight questions, two at a time; wrapper: Python source that runs it."""
    command = [sys.executable, *(["-c", wrapper] if wrapper else []), str(ROOT / "eval_gsm8k.py"), *TINY, "--data", ".", "--prompt", "p.json", "--be", "be.pt", "--batch", "2", "--max-new-tokens", "6", "--out", "out/g.jsonl"]
    return subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def rows(work):
    """Every line but a torn last one, without what differs from run to run."""
    lines = (work / "out/g.jsonl").read_text().split("\n")[:-1]
    return {(r["condition"], r["question"]): r["answer"] for r in map(json.loads, lines)}


AT = """
import os, runpy, signal, sys
fsync, left = os.fsync, [3]
def stop_here(fd):
    fsync(fd)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.NAME)
os.fsync = stop_here
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def whole(work):
    r = start(work)
    assert r.returncode == 0, r.stderr
    found = rows(work)
    assert len(found) == 3 * len(QUESTIONS)
    for path in (work / "out").iterdir():
        path.unlink()
    return found


def test_signals_and_sigkill_keep_what_was_written_and_the_same_command_goes_on(work, whole):
    for name, code in [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)]:
        r = start(work, AT.replace("NAME", name))
        assert r.returncode == code and "Traceback" not in r.stderr, (name, r.returncode, r.stderr[-300:])
        kept = rows(work)
        assert len(kept) == 6 and kept.items() <= whole.items()
        r = start(work)
        assert r.returncode == 0 and "6 answers found, 18 to make" in r.stdout and rows(work) == whole
        for path in (work / "out").iterdir():
            path.unlink()


def test_a_full_disk_is_one_line_and_the_rows_are_kept(work, whole):
    r = start(work, preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))))
    lines = [line for line in r.stderr.replace("\r", "\n").split("\n") if line.startswith("eval_gsm8k.py: ")]
    assert r.returncode == 2 and len(lines) == 1 and "could not be" in lines[0] and "Traceback" not in r.stderr, r.stderr[-400:]
    kept = rows(work)
    assert 0 < len(kept) < len(whole) and kept.items() <= whole.items()
    r = start(work)
    assert r.returncode == 0 and rows(work) == whole
