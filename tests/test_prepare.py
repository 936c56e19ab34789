"""models/prepare.py and data/*/prepare.py, without the network."""
import gguf
import numpy as np
import pytest

from conftest import main


def folder_of(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def parts(tmp_path):
    """The second of three files of a split GGUF."""
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00003.gguf", "llama")
    for key, value in (("split.no", 1), ("split.count", 3)):
        writer.add_uint16(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m-00002-of-00003.gguf"


def test_prepare_never_deletes_what_it_did_not_make(parts, tmp_path):
    """A folder of someone's, one with a config.json in it and no weights, a file: all stay as they are."""
    for name in ("thesis/chapter1.txt", "mine/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("Years of work.")
    for name in ("thesis", "mine", "m-00002-of-00003.gguf"):
        before = folder_of(tmp_path)
        r = main("models/prepare", "--gguf", parts, "--out", tmp_path / name)
        assert r.code == 2 and r.err.count("\n") == 1 and "--out" in r.err
        assert folder_of(tmp_path) == before


def test_a_split_gguf_is_refused(parts, tmp_path):
    before = folder_of(tmp_path)
    r = main("models/prepare", "--gguf", parts, "--out", "new/model", cwd=tmp_path)
    assert r.code == 2 and "one of 3 parts" in r.err and r.err.count("\n") == 1, r.err
    assert folder_of(tmp_path) == before and not (tmp_path / "new/model").exists()
    assert not [*(tmp_path / "new").iterdir()]
