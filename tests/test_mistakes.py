"""What users do wrong: exit code 2, one line on stderr that names what came and what to do, and nothing overwritten. A
save that fails leaves the old file whole."""
import errno, json, os, shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import CHATML, ROOT, SENTENCES, TINY, build_checkpoint, caught, main, opened, refused, script

kd = script("stage2_kd")
PROMPT, NOISE = ["--prompt", "p.txt"], ["--prompt", "p.txt", "--init", "noise", "--lam", "1"]


def contents(folder):
    """Every file and what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a model that is not all there, or not of the kind: each is a way to damage a copy of a good folder

def edit(name, **changes):
    """Change the json file `name` of the folder; a value of ... takes the key out."""
    def damage(folder):
        whole = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))
    return damage


def no_output_table(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_end(folder):
    (folder / "generation_config.json").unlink()
    edit("config.json", eos_token_id=None)(folder)
    edit("tokenizer_config.json", eos_token=...)(folder)


# as SentencePiece does: rendered as one text, a message has none
SPACED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
NO_SYSTEM = CHATML.replace("DEFAULT", "").replace("for m in messages", "for m in messages if m.role != 'system'")
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
           "layer_types": ["full_attention", "sliding_attention"]}
HYBRID = {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}
MODELS = {                                                  # case: (a good folder, its damage, words of the message)
    "no output table": ("llama3", no_output_table, ["1 missing"]),
    "sliding windows": ("qwen2", edit("config.json", **SLIDING), ["sliding_attention"]),
    "linear attention": ("qwen3", edit("config.json", **HYBRID), ["qwen3_next", "linear_attention"]),
    "no chat template": ("smol", lambda f: (f / "chat_template.jinja").unlink(), ["chat template"]),
    "a template that drops a system message": (
        "smol", lambda f: (f / "chat_template.jinja").write_text(NO_SYSTEM), ["found False"]),
    "a space before every piece": ("smol", edit("tokenizer.json", pre_tokenizer=SPACED), ["found False"]),
    "no end of a turn": ("smol", no_end, ["end of turn", "[]"]),
    "no such folder": ("smol", shutil.rmtree, ["No such file", "python models/prepare.py"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_right_is_refused_before_training(case, checkpoints, work):
    kind, damage, words = MODELS[case]
    folder = shutil.copytree(checkpoints[kind], work / "model")
    damage(folder)
    before = contents(work)
    r = main("stage1_recon", *PROMPT, "--model", folder, "--ae", "none", "--steps", 1, *TINY)
    refused(r, "stage1_recon.py: ", "--model", *words)
    assert contents(work) == before


# --- files

FILES = {                                                   # case: (script, arguments, files, words of the message)
    "no prompt": ("stage1_recon", ["--prompt", "nope.txt"], {}, ["nope.txt", "text"]),
    "a prompt not in UTF-8": ("stage2_kd", ["--prompt", "l.txt"], {"l.txt": b"\xe9t\xe9"}, ["l.txt", "UTF-8"]),
    "an empty prompt": ("stage1_recon", ["--prompt", "e.txt"], {"e.txt": b" \n\n"}, ["e.txt", "empty"]),
    "a prompt too long": ("stage1_recon", ["--prompt", "l.txt"], {"l.txt": " ".join(SENTENCES * 20).encode()},
                          ["at most 1024 tokens", "shorten"]),
    "a dialogue that ends with a question": ("stage2_kd", ["--prompt", "j.JSON"], {
        "j.JSON": b'{"messages": [{"role": "user", "content": "Why?"}]}'}, ["user's turn"]),
    "no queries beside the prompt": ("stage2_kd", ["--prompt", "a.txt"], {"a.txt": b"Be kind."},
                                     ["a.queries.txt", "python queries.py"]),
    "too few queries": ("stage2_kd", [*NOISE, "--queries", "f.txt"], {"f.txt": b"Why?\nHow?\nWho?\n"}, ["--batch"]),
    "a corpus row cut": ("stage0_ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one"}\n{"tex'}, ["line 2"]),
    "a corpus of short texts": ("stage0_ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one two"}\n' * 99},
                                ["200 characters", "python data/ae_corpus/prepare.py"]),
    "an [AE] of another model": ("stage1_recon", [*PROMPT, "--ae", "other.pt"], {}, ["other", "python stage0_ae.py"]),
    "stage 1 of another prompt": ("stage2_kd", ["--prompt", "b.txt", "--queries", "p.queries.txt"],
                                  {"b.txt": b"Cook."}, ["another prompt", "stage1_recon.py --prompt b.txt"]),
    "noise, and L_recon": ("stage2_kd", [*PROMPT, "--init", "noise"], {}, ["--lam 1"]),
    "stage 1 trained over": ("stage2_kd", [*PROMPT, "--out", "out/recon.pt"], {}, ["out/recon.pt", "another file"]),
    "stage 2 resumed from stage 1": ("stage2_kd", [*NOISE, "--resume", "--out", "out/recon.pt"], {},
                                     ["out/recon.pt", "a new --out"]),
    "stage 1 resumed from stage 2": ("stage1_recon", [*PROMPT, "--resume", "--out", "out/be.pt"], {},
                                     ["out/be.pt", "a new --out"]),
    "an --out that is no place": ("stage1_recon", [*PROMPT, "--out", "p.txt/be.pt"], {}, ["p.txt/be.pt", "--out"]),
    "an --out that is the prompt": ("stage1_recon", [*PROMPT, "--out", "p.txt"], {}, ["p.txt", "something else"]),
    "a table over an artifact": ("eval_kl", ["--queries", "p.queries.txt", "--out", "out/be.pt"], {}, [".json"]),
    "a table over someone's file": ("eval_kl", ["--queries", "p.queries.txt", "--out", "package.json"], {
        "package.json": b"{}"}, ["package.json", "a new .json"]),
    "an --out that is a document": ("stage1_recon", [*PROMPT, "--out", "a.docx"], {
        "a.docx": b"PK\5\6" + bytes(18)}, ["a.docx", "something else"]),
    "a text for an artifact": ("infer", ["--query", "Why?", "--be", "p.txt"], {}, ["not a zip file", "stage2_kd.py"]),
    "a look every no steps": ("stage2_kd", [*PROMPT, "--eval-every", 0], {}, ["above 0"]),
    "a weight of more than all": ("stage2_kd", [*PROMPT, "--lam", 1.5], {}, ["--lam 0 to 1"]),
    "half an emoji": ("stage1_recon", ["--prompt", "j.json"], {
        "j.json": b'{"messages": [{"role": "system", "content": "Be \\ud83d."}]}'}, ["surrogates"]),
    "a question to another model": ("infer", ["--query", "Why?", "--be", "other.pt"], {}, ["other.pt", "other"]),
    "more vectors than stage 1 made": ("stage2_kd", [*PROMPT, "--k", 4], {}, ["out/recon.pt", "--k 4"]),
    "no token": ("infer", ["--query", "Why?", "--max-new-tokens", 0], {}, ["--max-new-tokens", "at least 1"]),
    "a temperature that is no number": ("infer", ["--query", "Why?", "--temperature", "nan"], {}, ["--temperature"]),
    "more tokens than fit": ("infer", ["--query", "Why?", "--max-new-tokens", 1020], {}, ["at most 4 tokens"]),
    "far more tokens than fit": ("infer", ["--query", "Why?", "--max-new-tokens", 9999], {}, ["context is 1024"]),
    "no query to ask for": ("queries", [*PROMPT, "--count", 0, "--out", "new.txt"], {}, ["--count", "at least 1"]),
    "an empty question": ("infer", ["--query", "  "], {}, ["--query", "empty"]),
    "no test queries": ("eval_kl", ["--queries", "t.txt"], {"t.txt": b"\n"}, ["t.txt", "found 0"]),
    "no answer of an earlier run": ("eval_gsm8k", ["--data", "d.jsonl", "--out", "g.jsonl"], {
        "d.jsonl": b'{"question": "Why?", "answer": "#### 7"}\n', "g.jsonl": b"no rows\n"}, ["g.jsonl", "earlier run"]),
    "fewer than no questions": ("eval_gsm8k", ["--data", "d.jsonl", "--n", -2], {
        "d.jsonl": b'{"question": "Why?", "answer": "#### 7"}\n' * 3}, ["--n"]),
    "no gold": ("eval_gsm8k", ["--data", "g.jsonl"], {"g.jsonl": b'{"question": "Why?", "answer": "it is 7"}\n'},
                ["g.jsonl", "python data/gsm8k/prepare.py"]),
    "no RoleBench": ("eval_rolellm", ["--data", "nope"], {}, ["nope", "python data/rolellm/prepare.py"]),
    "queries to be found already there": ("queries", [*PROMPT], {}, ["p.queries.txt", "--out"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_right_is_refused(case, checkpoints, vectors, work):
    name, arguments, files, words = FILES[case]
    shutil.copytree(vectors, "out")
    other = {"kind": "be" if name == "infer" else "ae", "model": {"name": "other", "fingerprint": "f00"}}
    torch.save(opened("out/ae.pt") | other, "other.pt")
    for path, content in files.items():
        (work / path).write_bytes(content)
    if name == "stage1_recon" and "--ae" not in arguments:
        arguments = [*arguments, "--ae", "out/ae.pt"]
    before = contents(work)
    refused(main(name, *arguments, "--model", checkpoints["smol"], *TINY), f"{name}.py: ", *words)
    assert contents(work) == before


def test_prepare_takes_no_part_of_a_gguf_and_never_deletes_what_it_did_not_make(tmp_path):
    """A folder of someone's, one with a config.json in it and no weights, a file: all stay as they are."""
    part = tmp_path / "m-00002-of-00003.gguf"
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("thesis/chapter1.txt", "mine/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("Years of work.")
    before = contents(tmp_path)
    for out, word in [("thesis", "--out"), ("mine", "--out"), (part.name, "--out"), ("new/model", "one of 3 parts")]:
        refused(main("models/prepare", "--gguf", part, "--out", out, cwd=tmp_path), word)
        assert contents(tmp_path) == before


# --- and what only looks wrong

def test_what_ends_a_turn_is_all_that_config_and_tokenizer_say(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["smol"], tmp_path / "model")
    for ends, union in (([0, 7], [0, 2, 7]), (0, [0, 2])):
        edit("generation_config.json", eos_token_id=ends)(folder)
        model, tokenizer = script("infer").load_frozen(str(folder), "cpu")
        assert model.generation_config.eos_token_id == union and tokenizer.eos_token_id == 2
    (folder / "generation_config.json").unlink()
    assert script("infer").load_frozen(str(folder), "cpu")[0].generation_config.eos_token_id == [2]


@pytest.mark.parametrize("rope, context", [
    ({"rope_type": "linear", "factor": 4.0}, 4096),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}, 1024),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 128}, 1024)])
def test_the_context_counts_the_factor_where_the_config_does_not(rope, context, tmp_path):
    folder = build_checkpoint(tmp_path / "model", "smol", rope_parameters={"rope_theta": 10000.0, **rope})
    assert script("infer").load_frozen(str(folder), "cpu")[1].model_max_length == context


def test_from_another_folder_the_shipped_files_are_found_and_out_stays_here(checkpoints, vectors, work):
    """prompts/pirate.txt is beside the script; a file of that name in the current folder has the right of way."""
    arguments = ["--prompt", "prompts/pirate.txt", "--ae", vectors / "ae.pt", "--steps", 1]
    for text in ((ROOT / "prompts/pirate.txt").read_text().strip(), "Mine."):
        r = main("stage1_recon", *arguments, "--model", checkpoints["smol"], *TINY)
        assert r.code == 0 and opened("out/recon.pt")["messages"][0]["content"] == text, r.err
        (work / "prompts").mkdir(exist_ok=True)
        (work / "prompts/pirate.txt").write_text("Mine.")


# --- artifacts

OLD = {"kind": "be", "vector": torch.ones(2, 64), "model": {"name": "tiny", "fingerprint": "abc"}}
NEW = OLD | {"vector": torch.zeros(2, 64)}
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


BAD = {"missing": lambda p: p.unlink(),
       "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
       "one bit flipped": flip,
       "no artifact": lambda p: torch.save({"vector": torch.ones(2, 64)}, p),
       "another kind": lambda p: torch.save(OLD | {"kind": "ae"}, p),
       "another model's": lambda p: torch.save(OLD | {"model": {"name": "other", "fingerprint": "f00"}}, p),
       "code": lambda p: torch.save(OLD | {"more": Evil()}, p)}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_a_whole_artifact_is_refused_in_one_line(case, tmp_path, monkeypatch):
    path = tmp_path / "be.pt"
    monkeypatch.chdir(tmp_path)
    model = SimpleNamespace(fingerprint="abc")
    torch.save(OLD, path)
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
