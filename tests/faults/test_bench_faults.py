"""The fault harness over bench.py, in the way of test_faults.py: after a fault at any write its figures and its plot are the old ones or whole new ones, or not there."""
import json
import os
import shutil
import signal

import pytest

from conftest import SENTENCES
from test_cli import TINY
from test_faults import COUNT, EMPTY, Fault, complaint, finish, launch

pytestmark = pytest.mark.slow
LINE = [*TINY, "--quick", "--only", "5", "--prompt", "p.txt", "--prompts", "p.txt", "p.txt", "--repeats", "1", "--again", "--out", "out/b.json"]


@pytest.fixture(scope="module")
def material(checkpoints, tmp_path_factory):
    """A folder to begin in, the arguments, the writes of an undisturbed run, and the folder with what an older run made."""
    start = tmp_path_factory.mktemp("bench")
    (start / "p.txt").write_text("You are the old captain.")
    (start / "p.queries.txt").write_text("".join(f"{s}?\n" for s in SENTENCES))
    arguments, (read, write), older = ["--model", checkpoints["smol"], *LINE], os.pipe(), tmp_path_factory.mktemp("older") / "x"
    shutil.copytree(start, older)
    code, _, err = finish(*launch("bench.py", arguments, older, lambda event, path: os.write(write, f"{event} {path}\n".encode())))
    assert code == 0, err
    os.close(write)
    with open(read) as f:
        writes = [line for line in f.read().splitlines() if " out" in line]
    assert [w for w in writes if "rename" in w] == ["os.rename out/b.json", "os.rename out/b-ttft.png"]
    return start, older, arguments, writes


def whole(folder, older):
    """Nothing that is there is torn, and nothing that was there is gone."""
    figures, plot = folder / "out/b.json", folder / "out/b-ttft.png"
    if older and not (figures.exists() and plot.exists()):
        return False
    return (not figures.exists() or "5" in json.loads(figures.read_text())["items"]) and (not plot.exists() or plot.read_bytes().endswith(b"IEND\xaeB`\x82"))


@pytest.mark.parametrize("before", ["nothing there", "older figures there"])
@pytest.mark.parametrize("fault", ["kill", "full", "half", "read-only"])
def test_at_every_write(material, tmp_path, fault, before):
    start, older, arguments, writes = material
    wrong, older = [], older if before == "older figures there" else None
    for n, write in enumerate(writes):
        if fault in ("full", "half") and not write.startswith("open "):
            continue
        folder = shutil.copytree(older or start, tmp_path / str(n))
        if older and write.startswith("os.mkdir"):
            continue
        bring = Fault(fault, n - (older is not None and writes[0].startswith("os.mkdir")))
        code, _, err = finish(*launch("bench.py", arguments, folder, bring))
        assert bring.came[0], f"{write}: this run did not come to it"
        COUNT["faults"] += 1
        COUNT["lost"] += not whole(folder, older)
        if not whole(folder, older):
            wrong.append(f"{write}: figures are lost")
        if fault == "kill":
            assert code == -signal.SIGKILL
            code, _, err = finish(*launch("bench.py", arguments, folder))
            if code or not whole(folder, True):
                wrong.append(f"{write}: killed there, the same command ends with exit code {code}: {err[-160:]}")
        elif not (code == 0 and EMPTY.search(write)) and (said := complaint("bench.py", code, err)):
            wrong.append(f"{write}: {said}")
    assert not wrong, "\n".join(wrong)


def test_two_runs_on_one_output(material, tmp_path):
    """The first waits before its first rename; the second is told and stops; then the first ends as if it had been alone."""
    start, older, arguments, _ = material
    folder, reached, go, done = shutil.copytree(older, tmp_path / "work"), os.pipe(), os.pipe(), []
    old = (folder / "out/b.json").read_bytes()

    def gate(event, path):
        if event == "os.rename" and not done:
            done.append(1)
            os.write(reached[1], b"!")
            os.read(go[0], 1)
    first = launch("bench.py", arguments, folder, gate)
    os.close(reached[1])
    assert os.read(reached[0], 1) == b"!"
    code, _, err = finish(*launch("bench.py", arguments, folder))
    COUNT["faults"] += 1
    assert code == 2 and "another run" in err and len(err.strip().splitlines()) == 1 and (folder / "out/b.json").read_bytes() == old, err
    os.write(go[1], b"!")
    code, _, err = finish(*first)
    assert code == 0 and whole(folder, True) and (folder / "out/b.json").read_bytes() != old, err


def test_nothing_was_lost():
    print(f"\nfaults tried: {COUNT['faults']}; artifacts lost: {COUNT['lost']}")
    assert COUNT["lost"] == 0
