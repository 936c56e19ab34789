"""A save that fails leaves the old file whole; a file that is not whole is refused in one line."""
import errno, os, pickle
from pathlib import Path

import pytest
import torch

from conftest import opened, script

NAMES = ["stage0_ae", "stage1_recon", "stage2_kd"]
OLD, NEW = {"kind": "be", "vector": torch.ones(2, 64)}, {"kind": "be", "vector": torch.zeros(2, 64)}


def fails(error, written=b""):
    """A function that breaks off with this error, its file half written if it is torch.save."""
    def broken(obj, path):
        if written:
            Path(path).write_bytes(written)
        raise error
    return broken


FULL, DENIED = OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")
FAULTS = {"killed while it writes": ("torch.save", KeyboardInterrupt(), b"PK\3\4"),
          "killed before the rename": ("os.replace", KeyboardInterrupt(), b""),
          "a full disk": ("torch.save", FULL, b"PK\3\4" + bytes(2000)),
          "a full disk, as torch tells it": ("torch.save", RuntimeError("unexpected pos 64 vs 0"), b"PK\3\4"),
          "a read-only folder": ("torch.save", DENIED, b""),
          "a rename that is refused": ("os.replace", DENIED, b"")}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_save_that_fails_leaves_the_old_file_whole(name, case, tmp_path, monkeypatch, capsys):
    where, error, written = FAULTS[case]
    killed = isinstance(error, KeyboardInterrupt)
    module, path = script(name), tmp_path / "out" / "be.pt"
    module.save(path, **OLD)
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(where, fails(error, written))
        with pytest.raises(KeyboardInterrupt if killed else SystemExit) as e:
            module.save(path, **NEW)
    assert path.read_bytes() == before and torch.equal(opened(path)["vector"], OLD["vector"])
    if not killed:
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and error.args[-1] in err and "--out" in err
    module.save(path, **NEW)                                # and the next one is as good as any
    assert torch.equal(opened(path)["vector"], NEW["vector"])


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(SystemExit) as e:
        script("stage1_recon").save(tmp_path / "file" / "be.pt")
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    script("stage1_recon").save(tmp_path / "new" / "be.pt")
    assert not (tmp_path / "new" / "be.pt").exists()        # only tried


class Evil:
    """A pickle that makes a folder when it is opened by someone who trusts it."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip(path):
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("0000803f") * 8)          # one bit of a learned number
    data[at + 2] ^= 1
    path.write_bytes(data)


BAD = {"missing": lambda p: p.unlink(),
       "empty": lambda p: p.write_bytes(b""),
       "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
       "cut in half": lambda p: p.write_bytes(p.read_bytes()[:700]),
       "one bit flipped": flip,
       "a text": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
       "no artifact": lambda p: torch.save({"vector": torch.ones(2, 64)}, p),
       "another kind": lambda p: torch.save(GOOD | {"kind": "ae"}, p),
       "another model's": lambda p: torch.save(GOOD | {"model": {"name": "other", "fingerprint": "f00"}}, p),
       "code": lambda p: torch.save(GOOD | {"layout": Evil(p.parent / "ran")}, p),
       "a plain pickle of code": lambda p: p.write_bytes(pickle.dumps(Evil(p.parent / "ran")))}
GOOD = OLD | {"model": {"name": "tiny", "fingerprint": "abc"}}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_a_whole_artifact_is_refused_in_one_line(case, tmp_path, smol, monkeypatch, capsys):
    module, path = script("infer"), tmp_path / "be.pt"
    monkeypatch.setattr(module, "fingerprint", lambda model: "abc")
    torch.save(GOOD, path)
    assert torch.equal(module.load(path, "be", "python MAKER.py", smol[0])["vector"], OLD["vector"])
    BAD[case](path)
    with pytest.raises(SystemExit) as e:
        module.load(path, "be", "python MAKER.py", smol[0])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and "be.pt" in err and "python MAKER.py" in err
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_is_that_of_the_weights(smol):
    """The same in bf16, as a GPU loads them; another one with one matrix moved."""
    model, kd = smol[0], script("stage2_kd")
    half = type(model)(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    assert kd.fingerprint(half) == kd.fingerprint(model)
    with torch.no_grad():
        half.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert kd.fingerprint(half) != kd.fingerprint(model)
