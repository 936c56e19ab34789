"""Artifacts are data, not code. Whatever is done to the file, load_artifact gives back the very content that was saved, or exits with code 2 and one line.

The artifact under test is one that stage 2 saved. What a stranger could write with a right checksum (a key left out, a wrong shape) goes through save_artifact, so that it is the
content that is refused; and then through the scripts that read it, which must not answer with a traceback either.
"""
import copy
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import warnings
import zipfile
from types import SimpleNamespace

import pytest
import torch

from conftest import CPU
from test_cli import RANDOM, TINY, fill, said

MAKER = "python MAKER.py"


@pytest.fixture(scope="module")
def real(checkpoints, scripts, tmp_path_factory):
    """A folder with out/be.pt as stage 2 leaves it, and half.pt as it stood in the middle of that run."""
    folder, kd = fill(tmp_path_factory.mktemp("real")), scripts.kd
    with pytest.MonkeyPatch.context() as m:
        save, saves = kd.save_artifact, []

        def save_and_keep(path, artifact):
            saves.append("step")
            save("half.pt" if len(saves) == 1 else path, artifact)
        m.chdir(folder)
        m.setattr(kd, "save_artifact", save_and_keep)
        m.setattr(sys, "argv", ["stage2_kd.py", "--model", str(checkpoints["smol"]), *TINY, *map(str, RANDOM), "--steps", "4", "--eval-every", "2", "--lam", "1", "--k", "2"])
        kd.main()
    path = folder / "out/be.pt"
    owner = kd.fingerprint(kd.load_frozen(str(checkpoints["smol"]), CPU, torch.float32, "eager")[0])
    return SimpleNamespace(folder=folder, path=path, data=path.read_bytes(), owner=owner, content=torch.load(path, weights_only=True), half=torch.load(folder / "half.pt", weights_only=True))


@pytest.fixture
def read(real, scripts, tmp_path, capsys):
    """read(data or content) -> what load_artifact makes of it, or None where it refused it as it should."""
    def go(what, path=tmp_path / "be.pt"):
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what is not None:
            save(scripts, path, what)
        capsys.readouterr()
        try:
            return scripts.kd.load_artifact(path, "be", real.owner, 64, MAKER)
        except SystemExit as e:
            err = capsys.readouterr().err
            assert e.code == 2 and err.count("\n") == 1 and err.endswith("\n") and "be.pt" in err and MAKER in err and "Traceback" not in err, err
            return None
    return go


def save(scripts, path, content):
    """With a right checksum; what save_artifact cannot take, with none."""
    try:
        scripts.kd.save_artifact(path, content)
    except (SystemExit, RuntimeError, NotImplementedError, TypeError, MemoryError):
        torch.save(content, path)


def identical(a, b):
    """The same types, keys, shapes, dtypes and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if torch.is_tensor(a):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return a == b


def without(content, *path):
    """A copy that lacks the key at the end of path."""
    changed = copy.deepcopy(content)
    at = changed
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return changed


# --- damage

def test_the_artifact_itself_is_read(real, read):
    assert identical(read(real.data), real.content)
    assert identical(read(real.content), real.content)


def test_cut_at_every_hundredth_of_its_length(real, read):
    for percent in range(100):
        assert read(real.data[:len(real.data) * percent // 100]) is None, f"cut at {percent}%, it was read"
    assert read(real.data[:-1]) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_byte_is_caught_or_changes_nothing(real, read, seed):
    """150 places each; a byte of padding or of a time stamp may differ, what is read from the file may not."""
    rng, silent = random.Random(seed), []
    for _ in range(150):
        data, at = bytearray(real.data), rng.randrange(len(real.data))
        data[at] ^= rng.randrange(1, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(bytes(data))
        if found is not None and not identical(found, real.content):
            silent.append(at)
    assert not silent, f"other content was read from files with a changed byte at {silent}"


def test_a_changed_number_is_caught_by_the_checksum(real, read, tmp_path):
    """A file that is whole, and whose content has changed since it was saved: one bit of the vector, a setting, a metric, a text."""
    changes = [("vector", real.content["vector"] * 1.0001), ("step", 5), ("layout", "block"), ("best", real.content["best"] | {"kl": 0.0}), ("extra", 1),
               ("prompt", real.content["prompt"] | {"messages": [{"role": "system", "content": "You are another."}]}), ("history", real.content["history"][:-1])]
    for key, value in changes:
        torch.save(real.content | {key: value}, tmp_path / "be.pt")
        (tmp_path / "be.pt").write_bytes((tmp_path / "be.pt").read_bytes()[:-2] + real.data[-66:])          # the comment of the old content
        assert read(None) is None, key
    for key in real.content:                                                # a key lost on the way
        torch.save(without(real.content, key), tmp_path / "be.pt")
        assert read(None) is None, key


def test_saving_what_was_read_makes_a_new_checksum(real, read, scripts, tmp_path):
    scripts.kd.save_artifact(tmp_path / "be.pt", read(real.data) | {"report": "new"})
    assert read(None)["report"] == "new"


# --- content that no script would write, with a right checksum

@pytest.mark.parametrize("key", ["kind", "vector", "model", "layout", "stage", "prompt"])
def test_a_key_that_every_reader_needs_is_missed(real, read, key):
    assert read(without(real.content, key)) is None


def test_a_key_more_or_less_elsewhere_does_no_harm(real, read):
    for key in set(real.content) - {"kind", "vector", "model", "layout", "stage", "prompt"}:
        found = read(without(real.content, key))
        assert found is None or torch.equal(found["vector"], real.content["vector"]), key


ones = torch.ones(2, 64)
NAN, INF = ones.clone(), ones.clone()
NAN[1, 63], INF[0, 0] = float("nan"), float("-inf")
VECTORS = {"NaN": NAN, "inf": INF, "no rows": ones[:0], "another width": torch.ones(2, 48), "no columns": ones[:, :0], "one dimension": ones[0], "three dimensions": ones[None], "a scalar": torch.ones(()),
           "float16": ones.half(), "bfloat16": ones.bfloat16(), "float64": ones.double(), "int64": ones.long(), "bool": ones.bool(), "complex": ones.to(torch.complex64), "sparse": torch.eye(64).to_sparse(),
           "on no device": torch.ones(2, 64, device="meta"), "a list": ones.tolist(), "a dict": {"a": ones}, "None": None, "a text": "ones", "a number": 1.0}


@pytest.mark.parametrize("case", VECTORS)
def test_a_vector_of_the_wrong_kind_is_refused(real, read, tmp_path, case):
    assert read(real.content | {"vector": VECTORS[case]}) is None


FIELDS = [(key, value) for key in ("kind", "model", "layout", "stage", "prompt") for value in (None, 7, [], ["chat"], "x\ny", ones)] + [
    ("kind", {}), ("model", {}), ("layout", {}), ("stage", {}),
    ("model", {"name": "tiny", "fingerprint": None, "d": 64}), ("model", {"fingerprint": None}), ("model", "tiny"), ("layout", "inline")]


@pytest.mark.parametrize("key, value", FIELDS, ids=[f"{k}={str(v)[:12]!r}" for k, v in FIELDS])
def test_a_field_of_the_wrong_kind_is_refused(real, read, key, value):
    assert read(real.content | {key: value}) is None


@pytest.mark.parametrize("d", [48, None, "64", 64.5, torch.ones(3), [64]], ids=str)
def test_a_width_that_is_not_the_models_is_refused(real, read, d):
    """The model's own fingerprint, and a vector as wide as the artifact says, where it can be."""
    vector = torch.ones(2, 48) if isinstance(d, int) else ones
    assert read(real.content | {"vector": vector, "model": real.content["model"] | {"d": d}}) is None


def test_one_line_stays_one_line(real, scripts, tmp_path, capsys):
    """Texts of the file go into messages: a line break or a terminal's control codes in them are not passed on."""
    evil = "a\nb\r\x1b[2J"
    for content in (real.content | {"kind": evil}, real.content | {"model": {"name": evil, "fingerprint": "xyz", "d": 64}}, real.content | {"model": {"name": "tiny", "fingerprint": "xyz", "d": evil}}):
        scripts.kd.save_artifact(tmp_path / "be.pt", content)
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            scripts.kd.load_artifact(tmp_path / "be.pt", "be", real.owner, 64, MAKER)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and "\x1b" not in err and "\r" not in err, repr(err)


# --- the scripts that read it

PROMPTS = {"no tokens": lambda p: p.pop("tokens"), "no messages": lambda p: p.pop("messages"), "no sha256": lambda p: p.pop("sha256"), "messages a text": lambda p: p.update(messages="You are ..."),
           "messages of texts": lambda p: p.update(messages=["You are ..."]), "messages without a role": lambda p: p.update(messages=[{"content": "You are ..."}]),
           "messages of numbers": lambda p: p.update(messages=[{"role": "system", "content": 7}]), "no message": lambda p: p.update(messages=[])}


@pytest.mark.parametrize("case", PROMPTS)
def test_infer_reads_a_malformed_prompt_without_a_traceback(real, scripts, tmp_path, command, case):
    content = copy.deepcopy(real.content)
    PROMPTS[case](content["prompt"])
    scripts.kd.save_artifact(tmp_path / "be.pt", content)
    r = command(scripts.infer, "--be", tmp_path / "be.pt", *TINY, "--query", "Why?", "--compare", "--max-new-tokens", 2)
    assert r.code == 0 or (r.code == 2 and len(said(r.err)) == 1 and "be.pt" in r.err), r.err


@pytest.mark.parametrize("path", ["model name", "model fingerprint", "model d", "model revision", "metrics", "history", "config", "versions", "best", "start", "step"])
def test_infer_without_a_key(real, scripts, tmp_path, command, path):
    scripts.kd.save_artifact(tmp_path / "be.pt", without(real.content, *path.split()))
    r = command(scripts.infer, "--be", tmp_path / "be.pt", *TINY, "--query", "Why?", "--max-new-tokens", 2)
    assert r.code == 0 or (r.code == 2 and len(said(r.err)) == 1 and "be.pt" in r.err), r.err


HALVES = {"no config": {"config": None}, "no step": {"step": None}, "no best": {"best": None}, "no last": {"last": None}, "no history": {"history": None}, "no optimizer": {"optimizer": None},
          "step a text": {"step": "two"}, "step below zero": {"step": -1}, "history a text": {"history": "x"}, "best empty": {"best": {}}, "best without a vector": {"best": {"kl": 1.0, "step": 2}},
          "last of another shape": {"last": torch.ones(5, 64)}, "last NaN": {"last": NAN}, "last a list": {"last": ones.tolist()}, "start of another width": {"start": torch.ones(2, 48)}, "start a text": {"start": "x"},
          "optimizer empty": {"optimizer": {}}, "optimizer of another shape": {"optimizer": {"first": ones[:1], "second": ones, "whole": ones, "root": ones}}, "optimizer a list": {"optimizer": []}}


@pytest.mark.parametrize("case", HALVES)
def test_a_run_that_cannot_be_gone_on_with_is_refused_in_one_line(real, checkpoints, scripts, command, monkeypatch, case):
    monkeypatch.chdir(real.folder)
    content = real.half | {k: v for k, v in HALVES[case].items() if k == "config"}
    names = {"history": "histories", "best": "bests", "start": "starts"}      # the state of a run holds a list of these, an entry a prompt
    content["run"] = content["run"] | {names.get(k, k): [v] if k in names and v is not None else v for k, v in HALVES[case].items()}
    content["run"] = {k: v for k, v in content["run"].items() if v is not None or k == "tables"}
    content = {k: v for k, v in content.items() if v is not None}
    (real.folder / "broken").mkdir(exist_ok=True)
    scripts.kd.save_artifact("broken/be.pt", content)
    old = (real.folder / "broken/be.pt").read_bytes()
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *RANDOM, "--steps", 4, "--eval-every", 2, "--lam", 1, "--k", 2, "--out", "broken/be.pt", "--resume")
    assert r.code == 2 and len(said(r.err)) == 1 and "broken/be.pt" in said(r.err)[0], r.err
    assert (real.folder / "broken/be.pt").read_bytes() == old


# --- harm

class Evil:
    """A pickle that makes a folder when someone who trusts it opens it."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rezipped(data, change, compression=zipfile.ZIP_STORED):
    """The archive with each record's bytes replaced by change(name, bytes)."""
    with tempfile.TemporaryFile() as old, tempfile.TemporaryFile() as new:
        old.write(data)
        with zipfile.ZipFile(old) as a, zipfile.ZipFile(new, "w", compression) as b:
            for name in a.namelist():
                b.writestr(name, change(name, a.read(name)))
        new.seek(0)
        return new.read()


CODE = {
    "a pickle": lambda evil, data: pickle.dumps(evil),
    "a pickle of protocol 0": lambda evil, data: f"cos\nmkdir\n(V{evil.path}\ntR.".encode(),
    "an archive whose pickle was replaced": lambda evil, data: rezipped(data, lambda name, old: pickle.dumps(evil, 2) if name.endswith("data.pkl") else old),
    "an archive whose pickle runs before it gives the content": lambda evil, data: rezipped(data, lambda name, old: b"\x80\x02" + pickle.dumps(evil, 2)[2:-1] + b"0" + old[2:] if name.endswith("data.pkl") else old),
    "builtins": lambda evil, data: f"c__builtin__\neval\n(V__import__('os').mkdir('{evil.path}')\ntR.".encode(),
}


@pytest.mark.parametrize("case", CODE)
def test_nothing_runs(real, read, tmp_path, case):
    data = CODE[case](Evil(tmp_path / "ran"), real.data)
    assert read(data) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["vector", "history", "prompt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_runs_from_within_a_key(real, read, tmp_path, key, zipped):
    torch.save(real.content | {key: Evil(tmp_path / "ran")}, tmp_path / "be.pt", _use_new_zipfile_serialization=zipped)
    assert read(None) is None and not (tmp_path / "ran").exists()


def forked(work, folder):
    """work() in a copy of this process, with 4 GB and 20 s at most -> its exit code or minus its signal, its stderr, the MB that its memory grew by at the peak, its CPU seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            size, peak = (lambda name: int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) // 1024), None
            resource.setrlimit(resource.RLIMIT_AS, ((size("VmSize") + 4096) << 20,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            peak, seconds = size("VmHWM"), sum(os.times()[:2])
            try:
                work()
                code = 0
            except SystemExit as e:
                code = e.code
            (folder / "grew").write_text(f"{size('VmHWM') - peak} {sum(os.times()[:2]) - seconds}")
        except BaseException as e:
            sys.stderr.write(f"Traceback: {type(e).__name__}: {e}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    err = (folder / "stderr").read_text()
    assert status in (0, 2), f"{signal.Signals(-status).name if status < 0 else status}: {err}"
    megabytes, seconds = map(float, (folder / "grew").read_text().split())
    return status, err, megabytes, seconds


def giant(path, content, case, save):
    one, base = torch.ones(1, 1), content
    if case == "vector of 5 GB in 4 bytes":
        save(path, base | {"vector": one.expand(20_000_000, 64)})
    elif case == "vector of a terabyte in 4 bytes":
        save(path, base | {"vector": one.expand(10 ** 10, 64)})
    elif case == "state of 5 GB in 4 bytes":
        save(path, base | {"last": one.expand(20_000_000, 64), "vector": one.half()})        # refused for its vector, if not for its state
    elif case == "vector on no device":
        save(path, base | {"vector": torch.ones(20_000_000, 64, device="meta")})
    elif case == "storage that the record does not hold":
        save(path, base)
        path.write_bytes(rezipped(path.read_bytes(), lambda name, old: b"" if "/data/" in name else old))
    elif case == "compressed zeros":
        torch.save(base | {"vector": torch.zeros(1_000_000, 64)}, path)
        path.write_bytes(rezipped(path.read_bytes(), lambda name, old: old, zipfile.ZIP_DEFLATED))
    elif case == "a list that holds itself":
        rows = []
        rows.append(rows)
        torch.save(base | {"history": rows}, path)
    elif case == "a list doubled 40 times":
        rows = [1.0]
        for _ in range(40):
            rows = [rows, rows]
        torch.save(base | {"history": rows}, path)
    elif case == "a whole number of a million digits":
        torch.save(base | {"step": 1 << 3_000_000}, path)


GIANT = ["vector of 5 GB in 4 bytes", "vector of a terabyte in 4 bytes", "state of 5 GB in 4 bytes", "vector on no device", "storage that the record does not hold", "compressed zeros", "a list that holds itself",
         "a list doubled 40 times", "a whole number of a million digits"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("case", GIANT)
def test_a_small_file_that_claims_to_be_huge_costs_little(real, scripts, tmp_path, case):
    """Refused in one line, with less than 200 MB and one second of CPU."""
    forked(lambda: giant(tmp_path / "be.pt", real.content, case, lambda path, content: save(scripts, path, content)), tmp_path)
    assert (tmp_path / "be.pt").stat().st_size < 2_000_000
    code, err, megabytes, seconds = forked(lambda: scripts.kd.load_artifact(tmp_path / "be.pt", "be", real.owner, 64, MAKER), tmp_path)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err and MAKER in err, (code, err[-300:])
    assert megabytes < 200 and seconds < 1, (megabytes, seconds)
