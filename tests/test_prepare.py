"""models/prepare.py, without the network."""
import gguf
import numpy as np

from conftest import main, refused


def folder_of(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_prepare_refuses_a_part_of_a_gguf_and_never_deletes_what_it_did_not_make(tmp_path):
    """A folder of someone's, one with a config.json in it and no weights, a file: all stay as they are."""
    part = tmp_path / "m-00002-of-00003.gguf"
    writer = gguf.GGUFWriter(part, "llama")
    for key, value in (("split.no", 1), ("split.count", 3)):
        writer.add_uint16(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("thesis/chapter1.txt", "mine/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("Years of work.")
    before = folder_of(tmp_path)
    for out, word in [("thesis", "--out"), ("mine", "--out"), (part.name, "--out"), ("new/model", "one of 3 parts")]:
        refused(main("models/prepare", "--gguf", part, "--out", out, cwd=tmp_path), word)
        assert folder_of(tmp_path) == before
    assert not [*(tmp_path / "new").iterdir()]
