"""What users do wrong: exit code 2, one line on stderr that names what came and what to do, and nothing overwritten."""
import json, shutil

import pytest
import safetensors.torch
import torch
import transformers

from conftest import CHATML, ROOT, SENTENCES, TINY, build_checkpoint, main, opened, script

PROMPT, NOISE = ["--prompt", "p.txt"], ["--prompt", "p.txt", "--init", "noise", "--lam", "1"]


# --- a model that is not all there, or not of the kind: each is a way to damage a copy of a good folder

def edit(name, **changes):
    """Change the json file `name` of the folder; a value of ... takes the key out."""
    def damage(folder):
        whole = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))
    return damage


def without(*starts):
    def damage(folder):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        kept = {name: w for name, w in weights.items() if not name.startswith(starts)}
        assert len(kept) < len(weights)
        safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return damage


def pointer(folder):
    """What git leaves in the place of a large file where Git LFS is not installed."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\n")


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def named_templates(folder):
    """Several templates by name, and none by default."""
    (folder / "chat_template.jinja").unlink()
    edit("tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "{{ messages[0].content }}"}])(folder)


def no_end(folder):
    (folder / "generation_config.json").unlink()
    edit("config.json", eos_token_id=None)(folder)
    edit("tokenizer_config.json", eos_token=...)(folder)


def hybrid(folder):
    layers = ["linear_attention", "full_attention"]
    config = transformers.Qwen3NextConfig(hidden_size=64, num_hidden_layers=2, layer_types=layers)
    config.save_pretrained(folder)


# as SentencePiece does: rendered as one text, a message has none
SPACED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
NO_SYSTEM = CHATML.replace("DEFAULT", "").replace("for m in messages", "for m in messages if m.role != 'system'")
MODELS = {                                                  # case: (a good folder, its damage, words of the message)
    "no output table": ("llama3", without("lm_head"), ["found 1 missing"]),
    "no second layer": ("smol", without("model.layers.1."), ["found 9 missing"]),
    "a pointer to .bin weights": ("smol", pointer, ["Llama or Qwen"]),
    "sliding windows": ("qwen2", edit("config.json", use_sliding_window=True, sliding_window=8, max_window_layers=1,
                                      layer_types=["full_attention", "sliding_attention"]), ["sliding_attention"]),
    "a window in every layer": ("smol", edit("config.json", model_type="mistral", sliding_window=8), ["mistral"]),
    "linear attention": ("qwen3", hybrid, ["qwen3_next", "linear_attention"]),
    "an unknown family": ("smol", edit("config.json", model_type="own"), ["own"]),
    "no chat template": ("smol", lambda f: (f / "chat_template.jinja").unlink(), ["chat template"]),
    "templates without a default": ("smol", named_templates, ["template"]),
    "a template that does not parse": ("smol", template("{% for m in messages %}"), ["Llama or Qwen"]),
    "a template that refuses": ("smol", template("{{ raise_exception('no system') }}"), ["no system"]),
    "a template that drops a system message": ("smol", template(NO_SYSTEM), ["template and message: False"]),
    "a template that repeats": ("smol", template(CHATML.replace("DEFAULT", "{{ m.content }}")), ["message: False"]),
    "a space before every piece": ("smol", edit("tokenizer.json", pre_tokenizer=SPACED), ["message: False"]),
    "an unknown kind of tokenizer": ("smol", edit("tokenizer.json", model={"type": "Own"}), ["Llama or Qwen"]),
    "no end of a turn": ("smol", no_end, ["an end of turn, found []"]),
    "no such folder": ("smol", shutil.rmtree, ["no such folder", "python models/prepare.py"]),
}


def one_line(r, name, words):
    assert r.code == 2 and r.err.count("\n") == 1 and r.err.startswith(f"{name}.py: "), r.err
    assert all(word in r.err for word in words), r.err
    assert len(r.err) < 1000


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_right_is_refused_before_training(case, checkpoints, work):
    kind, damage, words = MODELS[case]
    folder = shutil.copytree(checkpoints[kind], work / "model")
    damage(folder)
    r = main("stage1_recon", *PROMPT, "--model", folder, "--ae", "none", "--steps", 1, *TINY)
    one_line(r, "stage1_recon", words)
    assert not (work / "out/recon.pt").exists()


# --- files

FILES = {                                                   # case: (script, arguments, files, words of the message)
    "no prompt": ("stage1_recon", ["--prompt", "nope.txt"], {}, ["nope.txt", "text"]),
    "an empty prompt": ("stage1_recon", ["--prompt", "e.txt"], {"e.txt": b" \n\n"}, ["e.txt", "empty"]),
    "a prompt not in UTF-8": ("stage2_kd", ["--prompt", "l.txt"], {"l.txt": b"\xe9t\xe9"}, ["l.txt", "UTF-8"]),
    "a prompt in UTF-16": ("stage1_recon", ["--prompt", "u.txt"], {"u.txt": "Be kind.".encode("utf-16")}, ["UTF-8"]),
    "a prompt too long": ("stage1_recon", ["--prompt", "l.txt"], {"l.txt": " ".join(SENTENCES * 20).encode()},
                          ["at most 1024 tokens", "shorten"]),
    "a broken dialogue": ("stage1_recon", ["--prompt", "j.json"], {"j.json": b"{"}, ["j.json", "messages"]),
    "a dialogue without content": ("stage2_kd", ["--prompt", "j.JSON"],
                                   {"j.JSON": b'{"messages": [{"role": "user"}]}'}, ["content"]),
    "no queries": ("stage2_kd", [*NOISE, "--queries", "nope.txt"], {}, ["nope.txt", "python queries.py"]),
    "no queries beside the prompt": ("stage2_kd", ["--prompt", "a.txt"], {"a.txt": b"Be kind."}, ["a.queries.txt"]),
    "too few queries": ("stage2_kd", [*NOISE, "--queries", "f.txt"], {"f.txt": b"Why?\nHow?\nWho?\n"}, ["--batch"]),
    "a json array of queries": ("stage2_kd", [*NOISE, "--queries", "q.txt"],
                                {"q.txt": json.dumps(SENTENCES).encode()}, ["q.txt, line 1"]),
    "a long json array": ("stage2_kd", [*NOISE, "--queries", "q.json"],
                          {"q.json": json.dumps(SENTENCES, indent=1).encode()}, ["q.json, line 1"]),
    "a csv": ("stage2_kd", [*NOISE, "--queries", "q.csv"], {"q.csv": b"id,question\n1,Why?\n" * 9}, ["q.csv, line 1"]),
    "a row of null": ("stage2_kd", [*NOISE, "--queries", "q.NDJSON"],
                      {"q.NDJSON": b'{"query": "Why?"}\n\n{"query": null}'}, ["q.NDJSON, line 3"]),
    "queries not in UTF-8": ("stage2_kd", [*NOISE, "--queries", "q.txt"], {"q.txt": b"\xff\xfe\xff"}, ["UTF-8"]),
    "no corpus": ("stage0_ae", ["--data", "nope/*.jsonl"], {}, ["nope/*.jsonl", "python data/ae_corpus/prepare.py"]),
    "a corpus row cut": ("stage0_ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one"}\n{"tex'}, ["line 2"]),
    "a corpus of short texts": ("stage0_ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one two"}\n' * 99},
                                ["200 characters", "python data/ae_corpus/prepare.py"]),
    "no [AE]": ("stage1_recon", [*PROMPT, "--ae", "nope.pt"], {}, ["nope.pt", "python stage0_ae.py"]),
    "a [BE] as [AE]": ("stage1_recon", [*PROMPT, "--ae", "out/be.pt"], {}, ["out/be.pt", "python stage0_ae.py"]),
    "an [AE] of another model": ("stage1_recon", [*PROMPT, "--ae", "other.pt"], {}, ["other", "python stage0_ae.py"]),
    "no stage 1": ("stage2_kd", [*PROMPT, "--init", "nope.pt"], {}, ["nope.pt", "stage1_recon.py --prompt p.txt"]),
    "stage 1 of another prompt": ("stage2_kd", ["--prompt", "b.txt", "--queries", "p.queries.txt"],
                                  {"b.txt": b"Cook."}, ["another prompt", "stage1_recon.py --prompt b.txt"]),
    "noise, and L_recon": ("stage2_kd", [*PROMPT, "--init", "noise"], {}, ["--lam 1"]),
    "stage 2 resumed from stage 1": ("stage2_kd", [*PROMPT, "--resume", "--out", "out/recon.pt"], {},
                                     ["out/recon.pt", "leave --resume out"]),
    "stage 1 resumed from stage 2": ("stage1_recon", [*PROMPT, "--resume", "--out", "out/be.pt"], {},
                                     ["out/be.pt", "leave --resume out"]),
    "nothing to resume": ("stage0_ae", ["--data", "corpus.jsonl", "--held-out", 4, "--resume", "--out", "new.pt"], {},
                          ["new.pt", "python stage0_ae.py"]),
    "an --out that is no place": ("stage1_recon", [*PROMPT, "--out", "p.txt/be.pt"], {}, ["p.txt/be.pt", "--out"]),
    "a question without [BE]": ("infer", ["--query", "Why?", "--be", "nope.pt"], {}, ["nope.pt", "stage1_recon.py"]),
    "a question to another model": ("infer", ["--query", "Why?", "--be", "other.pt"], {}, ["other.pt", "other"]),
    "an empty question": ("infer", ["--query", "  "], {}, ["--query", "empty"]),
    "an endless question": ("infer", ["--query", " ".join(SENTENCES * 20)], {}, ["shorten the question"]),
    "no test queries": ("eval_kl", ["--queries", "nope.txt"], {}, ["nope.txt", "--queries"]),
    "queries to be found already there": ("queries", [*PROMPT], {}, ["p.queries.txt", "--out"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_right_is_refused(case, checkpoints, vectors, work):
    name, arguments, files, words = FILES[case]
    shutil.copytree(vectors, "out")
    ae = opened("out/ae.pt")
    torch.save(ae | {"kind": "be" if name == "infer" else "ae", "model": {"name": "other", "fingerprint": "f00"},
                     "layout": "chat"}, "other.pt")
    for path, content in files.items():
        (work / path).write_bytes(content)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    if name == "stage1_recon" and "--ae" not in arguments:
        arguments = [*arguments, "--ae", "out/ae.pt"]
    r = main(name, *arguments, "--model", checkpoints["smol"], *TINY)
    one_line(r, name, words)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("arguments", [["--promt", "p.txt"], ["--steps", "ten"], ["--layout", "inline"]])
def test_an_option_that_is_none_is_an_error_and_not_guessed(arguments, work):
    r = main("stage2_kd", *PROMPT, *arguments)
    assert r.code == 2 and arguments[0] in r.err.splitlines()[-1] and "Traceback" not in r.err


# --- and what only looks wrong

def test_what_ends_a_turn_is_all_that_config_and_tokenizer_say(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["smol"], tmp_path / "model")
    edit("generation_config.json", eos_token_id=[0, 7])(folder)
    model, tokenizer = script("infer").load_frozen(str(folder), "cpu")
    assert model.generation_config.eos_token_id == [0, 2, 7] and tokenizer.eos_token_id == 2
    (folder / "generation_config.json").unlink()
    assert script("infer").load_frozen(str(folder), "cpu")[0].generation_config.eos_token_id == [2]


@pytest.mark.parametrize("rope, context", [
    ({"rope_type": "default"}, 1024), ({"rope_type": "linear", "factor": 4.0}, 4096),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}, 1024),
    ({"rope_type": "yarn", "factor": 4.0}, 4096),
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
