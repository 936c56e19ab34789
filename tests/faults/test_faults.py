"""The fault harness: every script that writes, at every file that it opens for writing, renames or removes. Whatever happens, the old artifact loads, or a new one, or none is there.

A run is forked from this process, where torch is loaded already, and goes through runpy as `python stage0_ae.py ...` would; an audit hook sees each write before it is done and brings the fault:

    kill          SIGKILL, among others between the temporary file and the rename; the same command then runs again, to the vector of an undisturbed run
    full, half    the disk is full at once, or after 700 bytes: RLIMIT_FSIZE, which holds for root too
    read-only     this write and all after it fail with EROFS

Faults that need no hook, and two runs on one output, go through real processes. With -s the count is printed at the end.
"""
import errno
import mmap
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter

import matplotlib.pyplot  # noqa: F401  (loaded here, so that no run has to)
import pytest
import torch

from conftest import ROOT
from test_cli import PROMPT, TINY, fill

pytestmark = pytest.mark.slow
SCRIPTS = {
    "stage0_ae.py": ["--data", "corpus.jsonl", "--steps", "2", "--eval-every", "1", "--held-out", "2", "--lr", "0.1", "--out", "out/x.pt"],
    "stage1_recon.py": ["--prompt", "p.txt", "--ae", "ae.pt", "--steps", "4", "--save-every", "2", "--lr", "0.1", "--out", "out/x.pt"],
    "stage2_kd.py": ["--prompt", "p.txt", "--ae", "ae.pt", "--be", "be.pt", "--steps", "4", "--eval-every", "2", "--batch", "4", "--answer-tokens", "6", "--lr", "0.1", "--out", "out/x.pt"],
}
MODULE = {"stage0_ae.py": "ae", "stage1_recon.py": "recon", "stage2_kd.py": "kd"}
EMPTY = re.compile(r"^open .*\.lock$")                                      # a file without content fits on a full disk; a lock that cannot be made may be done without
COUNT = Counter()


def launch(script, arguments, folder, hook=None):
    """A script in a fork of this process, in its own folder -> (pid, read ends of its stdout and stderr). hook(event, path) is called before each write under the folder."""
    pipes = [os.pipe(), os.pipe()]                                          # not files: a full disk must not swallow what is said about it
    pid = os.fork()
    if pid:
        for _, end in pipes:
            os.close(end)
        return pid, *(open(end, encoding="utf-8") for end, _ in pipes)
    code = 1
    try:
        os.chdir(folder)
        for fd, (_, end) in enumerate(pipes, 1):
            os.dup2(end, fd)
        sys.stdout, sys.stderr, sys.stdin = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False), open(os.devnull)
        sys.argv = [str(ROOT / script), *map(str, arguments)]
        if hook:
            sys.addaudithook(lambda event, args: watch(event, args, str(folder), hook))
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(bool(e.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def finish(pid, out, err):
    """-> (exit code, or minus the signal; stdout; stderr)"""
    with out, err:
        out, err = out.read(), err.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out, err


def watch(event, args, folder, hook):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or event in ("os.rename", "os.remove", "os.truncate", "os.mkdir"):
        path = args[1] if event == "os.rename" else args[0]
        path = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if path.startswith(folder + os.sep) and not (event == "os.mkdir" and os.path.isdir(path)):
            hook(event, os.path.relpath(path, folder))


class Fault:
    """A hook that lets n writes pass, then brings its fault."""
    def __init__(self, name, n):
        self.name, self.left, self.came = name, n, mmap.mmap(-1, 1)         # a byte that the fork shares

    def __call__(self, event, path):
        self.left -= 1
        if self.left >= 0:
            return
        self.came[0] = 1
        if self.name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.name == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        elif event == "open":
            resource.setrlimit(resource.RLIMIT_FSIZE, ({"full": 0, "half": 700}[self.name],) * 2)
            self.left = sys.maxsize


@pytest.fixture(scope="module")
def material(checkpoints, owner, scripts, tmp_path_factory):
    """A folder that every run begins in a copy of: the texts, an [AE], a [BE] of stage 1; and for each script its arguments, and what it makes undisturbed: the writes, the artifact, an older one."""
    folder = fill(tmp_path_factory.mktemp("material"))
    (folder / "out").mkdir()
    scripts.ae.save_artifact(folder / "ae.pt", {"kind": "ae", "vector": torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) / 10, "model": owner, "layout": "chat"})
    common, made = ["--model", checkpoints["smol"], *TINY], {}
    code, _, err = finish(*launch("stage1_recon.py", [*common, *SCRIPTS["stage1_recon.py"][:-1], "be.pt"], folder))
    assert code == 0, err
    for script, arguments in SCRIPTS.items():
        work = shutil.copytree(folder, folder.with_name(f"writes-{script}"))
        read, write = os.pipe()                                             # the list of writes, out of the fork
        code, _, err = finish(*launch(script, [*common, *arguments], work, lambda event, path: os.write(write, f"{event} {path}\n".encode())))
        assert code == 0, err
        os.close(write)
        with open(read) as f:
            writes = f.read().splitlines()
        older = shutil.copytree(folder, folder.with_name(f"older-{script}"))
        code, _, err = finish(*launch(script, [*common, *arguments, "--seed", "1"], older))
        assert code == 0, err
        whole, old = (scripts.kd.load_artifact(at / "out/x.pt", "ae" if script[5] == "0" else "be", owner["fingerprint"], 64, "MAKER") for at in (work, older))
        assert not torch.equal(whole["vector"], old["vector"]) and any("os.rename" in w and w.endswith("out/x.pt") for w in writes)
        made[script] = (common + arguments, writes, whole, (older / "out/x.pt").read_bytes())
    return folder, owner["fingerprint"], made


def artifact(scripts, script, path, owner, old):
    """What is at path: None for nothing, "old", "new" for another that loads, "lost" for one that does not; and for nothing where an old one was."""
    if not path.exists():
        return "lost" if old else None
    if path.read_bytes() == old:
        return "old"
    try:
        scripts.kd.load_artifact(path, "ae" if script == "stage0_ae.py" else "be", owner, 64, "MAKER")
    except SystemExit:
        return "lost"
    return "new"


def complaint(script, code, err, codes=(2,)):
    """What is wrong with how a run ended that could not write: it should say one line that names the file, and exit with code 2. A picture that cannot be drawn may be said and passed over."""
    lines = re.findall(rf"{script}: [^\r\n]+", err)
    if code not in codes or "Traceback" in err or len(lines) != 1 or "out/" not in lines[0]:
        last = re.split(r"[\r\n]+", err.strip())[-1]
        return f"exit code {code}, {len(lines)} lines of its own, the last line is: {last[-160:]}"


@pytest.mark.parametrize("before", ["nothing there", "an old artifact there"])
@pytest.mark.parametrize("fault", ["kill", "full", "half", "read-only"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_at_every_write(material, scripts, tmp_path, script, fault, before):
    start, owner, made = material
    arguments, writes, whole, older = made[script]
    old, wrong = older if before == "an old artifact there" else None, []
    for n, write in enumerate(writes):
        if fault in ("full", "half") and not write.startswith("open "):
            continue
        folder = shutil.copytree(start, tmp_path / str(n))
        if old:
            (folder / "out/x.pt").write_bytes(old)
        bring = Fault(fault, n)
        code, _, err = finish(*launch(script, arguments, folder, bring))
        assert bring.came[0], f"{write}: this run did not come to it"
        found = artifact(scripts, script, folder / "out/x.pt", owner, old)
        COUNT["faults"] += 1
        COUNT["lost"] += found == "lost"
        if found == "lost":
            wrong.append(f"{write}: the artifact is lost")
        if fault == "kill":
            assert code == -signal.SIGKILL
            code, _, err = finish(*launch(script, arguments, folder))
            if code or not torch.equal(torch.load(folder / "out/x.pt", weights_only=True)["vector"], whole["vector"]):
                wrong.append(f"{write}: killed there, the same command ends with exit code {code} or another vector: {err[-160:]}")
        elif not (code == 0 and EMPTY.search(write)) and (said := complaint(script, code, err, (0, 2) if write.endswith(".png") else (2,))):
            wrong.append(f"{write}: {said}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(writes)} writes\n" + "\n".join(wrong)


def process(script, arguments, folder, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_file_may_grow_beyond_700_bytes(material, scripts, tmp_path, script):
    """The full disk as a user meets it, from the shell: `ulimit -f`."""
    start, owner, made = material
    arguments, _, _, old = made[script]
    folder = shutil.copytree(start, tmp_path / "work")
    (folder / "out/x.pt").write_bytes(old)
    r = process(script, arguments, folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)))
    found = artifact(scripts, script, folder / "out/x.pt", owner, old)
    COUNT["faults"] += 1
    COUNT["lost"] += found != "old"
    assert found == "old" and complaint(script, r.returncode, r.stderr) is None, complaint(script, r.returncode, r.stderr)


PLACES = {"under a file": "p.txt/x.pt", "a folder": "out", "in /proc": "/proc/x.pt", "of a name too long": "out/" + 300 * "x" + ".pt"}


@pytest.mark.parametrize("place", [*PLACES, "read-only for this user"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_that_cannot_be_written_is_said_before_the_work(material, tmp_path, script, place):
    """Before a step is made: there is no progress bar yet."""
    start, _, made = material
    folder = shutil.copytree(start, tmp_path / "work")
    if place not in PLACES:
        if os.geteuid() == 0:
            pytest.skip("permission bits do not bind root; the audit hook's read-only folder does")
        (folder / "out").chmod(0o500)
    out = PLACES.get(place, "out/x.pt")
    code, said, err = finish(*launch(script, made[script][0][:-1] + [out], folder))
    (folder / "out").chmod(0o700)
    COUNT["faults"] += 1
    assert code == 2 and "Traceback" not in err and len(re.findall(rf"{script}: [^\r\n]+", err)) == 1 and out[:40] in err, err[-300:]
    assert "it/s" not in err and "s/it" not in err and " 0%|" not in err, "it began to work first"
    assert (folder / "p.txt").read_text() == PROMPT and not list((folder / "out").iterdir())


class Gate:
    """A hook that stops the run before its first rename onto the artifact: says so through one pipe, goes on when told through the other."""
    def __init__(self):
        self.reached, self.open, self.done = os.pipe(), os.pipe(), False

    def __call__(self, event, path):
        if event == "os.rename" and path == "out/x.pt" and not self.done:
            self.done = True
            os.write(self.reached[1], b"!")
            os.read(self.open[0], 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_on_one_output(material, scripts, tmp_path, script):
    """The second is told and stops; the first ends as if it had been alone; and its lock, left behind, holds no one up."""
    start, owner, made = material
    arguments, _, whole, old = made[script]
    folder, gate = shutil.copytree(start, tmp_path / "work"), Gate()
    (folder / "out/x.pt").write_bytes(old)
    first = launch(script, arguments, folder, gate)
    os.close(gate.reached[1])
    assert os.read(gate.reached[0], 1) == b"!", "the first run did not come to its first save"
    second = process(script, arguments, folder)
    between = artifact(scripts, script, folder / "out/x.pt", owner, old)
    os.write(gate.open[1], b"!")
    code, _, err = finish(*first)
    after = artifact(scripts, script, folder / "out/x.pt", owner, old)
    COUNT["faults"] += 1
    COUNT["lost"] += "lost" in (between, after)
    for end in (gate.reached[0], *gate.open):
        os.close(end)
    lines = re.findall(rf"{script}: [^\r\n]+", second.stderr)
    assert second.returncode == 2 and len(lines) == 1 and "another run" in lines[0] and "Traceback" not in second.stderr, (second.returncode, second.stderr[-300:])
    assert between == "old", "the second run wrote, too"
    assert code == 0 and after == "new", err
    assert torch.equal(torch.load(folder / "out/x.pt", weights_only=True)["vector"], whole["vector"])
    code, _, err = finish(*launch(script, arguments, folder))
    assert code == 0, err


def test_no_artifact_was_lost(capsys):
    print(f"\nfaults tried: {COUNT['faults']}; artifacts lost: {COUNT['lost']}")
    assert COUNT["lost"] == 0
