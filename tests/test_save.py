"""A save that fails leaves the old file whole; a file that is not whole is refused in one line."""
import errno, os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import caught, opened, refused, script

kd = script("stage2_kd")
OLD, NEW = {"kind": "be", "vector": torch.ones(2, 64)}, {"kind": "be", "vector": torch.zeros(2, 64)}
FAULTS = {"killed while it writes": ("torch.save", KeyboardInterrupt()),
          "killed before the rename": ("os.replace", KeyboardInterrupt()),
          "a full disk, as torch tells it": ("torch.save", RuntimeError("unexpected pos 64 vs 0")),
          "a rename that is refused": ("os.replace", PermissionError(errno.EACCES, "Permission denied"))}


@pytest.mark.parametrize("case", FAULTS)
def test_a_save_that_fails_leaves_the_old_file_whole(case, tmp_path, monkeypatch):
    where, error = FAULTS[case]
    path = tmp_path / "out" / "be.pt"
    kd.save(path, **OLD)
    before = path.read_bytes()

    def broken(obj, path):
        if where == "torch.save":
            Path(path).write_bytes(b"PK\3\4" + bytes(2000))
        raise error
    with monkeypatch.context() as m:
        m.setattr(where, broken)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                kd.save(path, **NEW)
        else:
            refused(caught(kd.save, path, **NEW), "be.pt", error.args[-1], "--out")
    kd.save(path)                                           # without an artifact the place is only tried
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
    kd.save(path, **NEW)                                    # and the next one is as good as any
    assert torch.equal(opened(path)["vector"], NEW["vector"])


class Evil:
    """A pickle that makes a folder when it is opened by someone who trusts it."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


def flip(path):
    """One bit of a learned number."""
    data = bytearray(path.read_bytes())
    data[data.index(bytes.fromhex("0000803f") * 8) + 2] ^= 1
    path.write_bytes(data)


GOOD = OLD | {"model": {"name": "tiny", "fingerprint": "abc"}}
BAD = {"missing": lambda p: p.unlink(),
       "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
       "one bit flipped": flip,
       "no artifact": lambda p: torch.save({"vector": torch.ones(2, 64)}, p),
       "another kind": lambda p: torch.save(GOOD | {"kind": "ae"}, p),
       "another model's": lambda p: torch.save(GOOD | {"model": {"name": "other", "fingerprint": "f00"}}, p),
       "code": lambda p: torch.save(GOOD | {"more": Evil()}, p)}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_a_whole_artifact_is_refused_in_one_line(case, tmp_path, monkeypatch):
    path = tmp_path / "be.pt"
    monkeypatch.chdir(tmp_path)
    model = SimpleNamespace(fingerprint="abc")
    torch.save(GOOD, path)
    assert torch.equal(kd.load(path, "be", "python MAKER.py", model)["vector"], OLD["vector"])
    BAD[case](path)
    refused(caught(kd.load, path, "be", "python MAKER.py", model), "be.pt", "python MAKER.py")
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_is_that_of_the_weights(smol, tmp_path, monkeypatch):
    """The same in bf16, as a GPU loads them; another one with one matrix moved."""
    model, tokenizer = smol
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    half = kd.load_frozen(str(tmp_path), "cpu")[0]
    assert half.dtype == torch.bfloat16 and half.fingerprint == model.fingerprint
    with torch.no_grad():
        half.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    half.save_pretrained(tmp_path)
    assert kd.load_frozen(str(tmp_path), "cpu")[0].fingerprint != model.fingerprint
