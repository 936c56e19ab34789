"""export.py: a plain transformers model out of the exported folder says what the hook says, no other weight has moved, and the learned token is never said."""
import base64
import copy
import hashlib
import io
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

from conftest import CPU, SENTENCES, load_script

QUERIES = ["What is the capital of France?", "Tell me why, please: 18 - 7 = 11", "  Nobody asked.\n", "1, 2, 37!"]

# name: (tiny model, tied, unused rows, layout, k)
CASES = {
    "llama-tied-chat-1": ("smol", True, 0, "chat", 1),
    "llama-tied-block-2": ("smol", True, 0, "block", 2),
    "llama-untied-block-1": ("llama3", False, 0, "block", 1),
    "llama-untied-chat-2": ("llama3", False, 0, "chat", 2),
    "qwen-untied-chat-1": ("qwen", False, 0, "chat", 1),
    "qwen-untied-spare-block-1": ("qwen", False, 7, "block", 1),
    "qwen-tied-spare-chat-2": ("qwen", True, 7, "chat", 2),
    "qwen-tied-spare1-block-2": ("qwen", True, 1, "block", 2),             # one unused row, the other one is new
}


@pytest.fixture(scope="module")
def export():
    return load_script("export")


def confident(source, folder, tied, spare):
    """A tiny model like `source`, with logits as far apart as those of trained models are: in a flat model the mean logit has a probability near 1/V, which is 0.002 here."""
    config = transformers.AutoConfig.from_pretrained(source)
    config.update({"tie_word_embeddings": tied, "vocab_size": config.vocab_size + spare})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= 8
        for layer in model.model.layers:                                    # so that what it says depends on the text
            layer.input_layernorm.weight *= 4
            layer.post_attention_layernorm.weight *= 4
    model.to(config.dtype).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def save_be(path, scripts, model_folder, layout, k, prompt="prompts/Old Captain.txt", seed=0, **changes):
    model, _ = scripts.infer.load_frozen(str(model_folder), CPU, torch.float32, "eager")
    table = model.get_input_embeddings().weight
    vector = table.mean(0) + 5 * table.std(0) * torch.randn(k, 64, generator=torch.Generator().manual_seed(seed))
    scripts.kd.save_artifact(path, {"kind": "be", "stage": "kd", "vector": vector, "layout": layout, "step": 1, "config": {"prompt": prompt},
                                    "model": {"name": str(model_folder), "revision": None, "fingerprint": scripts.infer.fingerprint(model), "d": 64},
                                    "prompt": {"sha256": "abc", "tokens": 30, "messages": [{"role": "system", "content": "The secret recipe."}]}} | changes)
    return path


def run_export(export, *arguments):
    """main() as a module fixture can call it -> exit code."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr("sys.argv", ["export.py", *map(str, arguments)])
        export.main()


@pytest.fixture(scope="module", params=CASES)
def case(request, export, scripts, checkpoints, tmp_path_factory):
    """One export in fp32, opened by plain transformers, beside its base."""
    kind, tied, spare, layout, k = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = confident(checkpoints[kind], folder / "base", tied, spare)
    be = torch.load(save_be(folder / "be.pt", scripts, base, layout, k), weights_only=True)
    run_export(export, folder / "be.pt", "--out", folder / "served", "--dtype", "fp32", "--pieces", 4)
    model, tokenizer = scripts.infer.load_frozen(str(base), CPU, torch.float32, "eager")
    served = transformers.AutoModelForCausalLM.from_pretrained(folder / "served", attn_implementation="eager")
    return SimpleNamespace(folder=folder, tied=tied, spare=spare, layout=layout, k=k, be=be, model=model, tokenizer=tokenizer, name="<|be:old-captain|>", served=served,
                           read=transformers.AutoTokenizer.from_pretrained(folder / "served"), ids=json.loads((folder / "served/nanobe.json").read_text())["tokens"])


def fed(case, turns, system=None):
    """The ids that the exported folder's own tokenizer and template make of a chat."""
    return case.read.apply_chat_template([{"role": "system", "content": system or case.name}] + turns, add_generation_prompt=True, return_dict=False)


def hook(case, scripts, turns, limit=10):
    """(ids with slots, greedy answer) with the untouched base model and the vector in its slot, as infer.py does it."""
    ids = scripts.infer.layout_ids(case.tokenizer, case.layout, [-1 - i for i in range(case.k)], turns)
    with torch.no_grad():
        return ids, list(scripts.infer.answer(case.model, ids, case.be["vector"], {case.tokenizer.eos_token_id}, limit, 0, None))


def plain(model, ids, limit):
    """The exported model's own greedy answer, by generate(), without the stop token."""
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False, max_new_tokens=limit)
    return [t for t in out[0, len(ids):].tolist() if t != model.generation_config.eos_token_id]


def test_greedy_chat_is_token_identical_to_the_hook(case, scripts):
    new, answers = case.ids[case.name]["ids"], []
    later = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Aye."}, {"role": "user", "content": "Why?"}]
    for turns in [[{"role": "user", "content": q}] for q in QUERIES] + [later]:
        turns = [t | {"content": t["content"].strip()} for t in turns]
        ids, answer = hook(case, scripts, turns)
        given = fed(case, turns)
        assert given == [new[-1 - t] if t < 0 else t for t in ids]
        assert plain(case.served, given, 10) == answer
        answers.append(answer)
    with torch.no_grad():                                                   # and the vector matters here: with zeros in its place the answer is another
        ids = hook(case, scripts, [{"role": "user", "content": QUERIES[0]}], 1)[0]
        assert answers[0] != list(scripts.infer.answer(case.model, ids, case.be["vector"] * 0, {case.tokenizer.eos_token_id}, 10, 0, None))


def test_the_learned_token_is_never_near_the_top(case):
    """On raw logits, so without generation_config's suppress_tokens, which some engines ignore; over chats that the exporter has not seen."""
    new = case.ids[case.name]["ids"]
    assert case.served.generation_config.suppress_tokens == new
    for q in SENTENCES[:4]:
        ids = fed(case, [{"role": "user", "content": q}]) + case.read(" ".join(SENTENCES), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            p = torch.softmax(case.served(torch.tensor([ids])).logits[0], -1)
        assert p[:, new].sum(-1).max() < 1e-3 and not set(p.argmax(-1).tolist()) & set(new)


def test_every_old_weight_is_as_it_was(case):
    """Read from the files, not through transformers."""
    base, served = [safetensors.torch.load_file(case.folder / f / "model.safetensors") for f in ("base", "served")]
    new = case.ids[case.name]["ids"]
    old = [i for i in range(case.model.config.vocab_size) if i not in new]
    assert len(new) == case.k and new == list(range(len(case.tokenizer), len(case.tokenizer) + case.k))
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(served) == set(base) | tables and ("lm_head.weight" not in base) == case.tied
    for name, w in served.items():
        assert w.dtype == torch.float32
        if name in tables:
            b = base["model.embed_tokens.weight" if name not in base else name].float()
            assert w.shape == (max(len(b), max(new) + 1), 64) and torch.equal(w[old], b[old])      # no padding
        else:
            assert torch.equal(w, base[name].float())
    assert torch.equal(served["model.embed_tokens.weight"][new], case.be["vector"])
    config, before = [json.loads((case.folder / f / "config.json").read_text()) for f in ("served", "base")]
    changed = {key for key in config.keys() | before.keys() if config.get(key) != before.get(key)}
    assert changed <= {"vocab_size", "tie_word_embeddings", "dtype"} and config["tie_word_embeddings"] is False and config["vocab_size"] == len(served["lm_head.weight"])


def test_other_chats_are_rendered_by_the_stock_template(case):
    if case.layout == "chat" and case.k == 1:
        assert case.read.chat_template == case.tokenizer.chat_template
    user, later = {"role": "user", "content": QUERIES[0]}, [{"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Why?"}]
    for chat in ([user], [user, *later], [{"role": "system", "content": "Be kind. "}, user], [{"role": "system", "content": "<|be:nobody|>"}, user, *later]):
        for generate in (True, False):
            texts = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate) for t in (case.tokenizer, case.read)]
            assert texts[0] == texts[1]
    ids = [t.apply_chat_template([{"role": "system", "content": "<|be:nobody|>"}, user], return_dict=False) for t in (case.tokenizer, case.read)]
    assert ids[0] == ids[1]                                                 # an unknown name is text like any other


def test_where_else_the_token_may_stand(case):
    """In the system message beside other words it is the token, in the system block; in a user message its text is the token too, unless it is the short name of several."""
    new, question = case.ids[case.name]["ids"], [{"role": "user", "content": "Why?"}]
    beside = fed(case, question, f"{case.name} Be brief.")
    stock = fed(case, question, "Be brief.")
    at = beside.index(new[0])
    assert beside[at:at + case.k] == new and beside[:at] == stock[:at]      # the block's own words stay around it
    spelled = fed(case, [{"role": "user", "content": f"What is {case.name}?"}], "Be brief.")
    assert [t for t in spelled if t in new] == (new if case.k == 1 else [])
    assert case.read.decode(fed(case, question), skip_special_tokens=True).count("be:") == 0


def test_what_is_printed_serves_it(export, scripts, command, case, tmp_path):
    """In the base's own dtype, by the default name and the default model."""
    r = command(export, case.folder / "be.pt", "--out", tmp_path / "new/served", "--pieces", 4)
    assert r.code == 0 and not r.err
    old = case.model.config.vocab_size - min(case.spare, case.k)
    assert f"{old} old rows of both table and head are bit-identical to the base;" in r.out and re.search(r"probability at most \d\.\de-\d\d", r.out)
    assert f"--model {tmp_path}/new/served" in r.out and f"transformers serve {tmp_path}/new/served" in r.out
    body = json.loads(re.search(r"-d '(.*)'", r.out)[1])
    assert body["model"] == str(tmp_path / "new/served") and body["messages"][0] == {"role": "system", "content": case.name}
    assert sorted(os.listdir(tmp_path / "new")) == ["served", "served.lock"]
    stored = transformers.AutoConfig.from_pretrained(case.folder / "base").dtype
    w = safetensors.torch.load_file(tmp_path / "new/served/model.safetensors")
    assert {t.dtype for t in w.values()} == {stored} and torch.equal(w["model.embed_tokens.weight"][case.ids[case.name]["ids"]], case.be["vector"].to(stored))
    for file in (tmp_path / "new/served").iterdir():
        assert b"secret recipe" not in file.read_bytes(), "the prompt's text is in the export"


# --- several artifacts, names, refusals: one tied Llama

@pytest.fixture(scope="module")
def shelf(export, scripts, checkpoints, tmp_path_factory):
    """A folder of artifacts: a (chat, k 1), b (block, k 2), c (chat, another model), flat (a model with flat logits), ae."""
    folder = tmp_path_factory.mktemp("shelf")
    base, other = confident(checkpoints["smol"], folder / "base", True, 0), confident(checkpoints["llama3"], folder / "other", False, 0)
    save_be(folder / "a.pt", scripts, base, "chat", 1)
    save_be(folder / "b.pt", scripts, base, "block", 2, prompt="x/b.json", seed=1)
    save_be(folder / "c.pt", scripts, other, "chat", 1)
    save_be(folder / "flat.pt", scripts, checkpoints["smol"], "chat", 1)
    save_be(folder / "ae.pt", scripts, base, "chat", 1, kind="ae")
    return folder


def test_several_artifacts_of_one_model_go_in_together(export, scripts, shelf, tmp_path, command):
    r = command(export, shelf / "a.pt", shelf / "b.pt", shelf / "a.pt", "--out", tmp_path / "served", "--names", "a", "b", "again", "--pieces", 3)
    assert r.code == 0 and "the learned tokens at" in r.out
    tokens = json.loads((tmp_path / "served/nanobe.json").read_text())["tokens"]
    model, tokenizer = scripts.infer.load_frozen(str(shelf / "base"), CPU, torch.float32, "eager")
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "served", attn_implementation="eager")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "served")
    turns, answers = [{"role": "user", "content": "What is the capital of France?"}], {}
    for file, name, layout, k in (("a", "a", "chat", 1), ("b", "b", "block", 2), ("a", "again", "chat", 1)):
        ids = scripts.infer.layout_ids(tokenizer, layout, [-1 - i for i in range(k)], turns)
        vector = torch.load(shelf / f"{file}.pt", weights_only=True)["vector"]
        with torch.no_grad():
            answers[name] = list(scripts.infer.answer(model, ids, vector, {tokenizer.eos_token_id}, 12, 0, None))
        given = read.apply_chat_template([{"role": "system", "content": f"<|be:{name}|>"}] + turns, add_generation_prompt=True, return_dict=False)
        assert given == [tokens[f"<|be:{name}|>"]["ids"][-1 - t] if t < 0 else t for t in ids]
        assert plain(served, given, 12) == answers[name]
    assert answers["a"] == answers["again"] != answers["b"]


def test_the_default_name_is_the_prompts(export):
    be = [{"config": {"prompt": p}, "prompt": {}} for p in ("prompts/Old Captain.txt", "b/Über_1-x.json", ["only.txt"], ["one.txt", "two.txt"])]
    be += [{"prompt": {}}, {"config": {"prompt": ["one.txt", "two.txt"]}, "prompt": {"path": "b/two.txt"}}]
    names = ["<|be:old-captain|>", "<|be:ber_1-x|>", "<|be:only|>", "<|be:4-two|>", "<|be:5|>", "<|be:two|>"]
    assert export.token_names(["1.pt", "2.pt", "3.pt", "out/4.two.pt", "out/5.pt", "out/two.be.pt"], be, None) == names


REFUSED = {                                                                 # case: (arguments, words of the message)
    "out is there": (["a.pt", "--out", "base"], ["base: already there", "--overwrite"]),
    "out is no export": (["a.pt", "--out", "base", "--overwrite"], ["no export of this script"]),
    "no out": (["a.pt"], ["--out FOLDER", "--prompt-embeds FILE"]),
    "two outs": (["a.pt", "--out", "new", "--prompt-embeds", "new.json"], ["expected one of"]),
    "no such artifact": (["nobody.pt", "--out", "new"], ["nobody.pt: not there"]),
    "an [AE]": (["ae.pt", "--out", "new"], ["expected an artifact of kind 'be', found 'ae'"]),
    "another model's": (["a.pt", "c.pt", "--out", "new", "--names", "a", "c"], ["c.pt: its vector belongs to another model"]),
    "another --model": (["a.pt", "--out", "new", "--model", "other"], ["a.pt: its vector belongs to another model"]),
    "no such model": (["a.pt", "--out", "new", "--model", "nowhere"], ["--model nowhere: expected a hub name or a folder"]),
    "one name twice": (["a.pt", "a.pt", "--out", "new"], ["the name old-captain is taken by a.pt", "--names"]),
    "too few names": (["a.pt", "b.pt", "--out", "new", "--names", "a"], ["--names: expected one for each of 2 artifacts, found 1"]),
    "a name with a sign": (["a.pt", "--out", "new", "--names", "A|>"], ["--names 'A|>'", "try a"]),
    "a probability": (["a.pt", "--out", "new", "--bound", "0", "--pieces", "2"], ["above --bound 0", "nothing was written"]),
    "a model with flat logits": (["flat.pt", "--out", "new", "--pieces", "2"], ["in --text, above --bound 0.001, so the model would say it"]),
    "no text": (["a.pt", "--out", "new", "--text", "nowhere.txt"], ["--text: expected text files"]),
    "little text": (["a.pt", "--out", "new", "--text", "little.txt"], ["expected at least 120 words, found 3"]),
    "a place that cannot be": (["a.pt", "--out", "a.pt/new", "--pieces", "2"], ["a.pt/new: cannot be written: "]),
    "a message that cannot be": (["a.pt", "--prompt-embeds", "a.pt/new"], ["a.pt/new: cannot be written: "]),
    "two messages": (["a.pt", "a.pt", "--prompt-embeds", "new", "--names", "a", "b"], ["expected one artifact of layout chat, found 2"]),
    "a block message": (["b.pt", "--prompt-embeds", "new"], ["the first of layout block"]),
    "a message over a folder": (["a.pt", "--prompt-embeds", "base", "--overwrite"], ["expected a file to write, found a folder"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_in_one_line_and_leaves_nothing(name, export, shelf, command, monkeypatch):
    monkeypatch.chdir(shelf)
    (shelf / "little.txt").write_text("only three words")
    def files():
        return {p: p.stat().st_mtime_ns for p in shelf.rglob("*") if p.suffix != ".lock"}
    before = files()
    arguments, words = REFUSED[name]
    r = command(export, *arguments)
    assert r.code == 2 and r.err.count("\n") == 1 and r.err.startswith("export.py: ")
    for word in words:
        assert word in r.err
    assert files() == before


def test_hidden_states_that_overflow_are_refused(export, shelf, tmp_path, command, monkeypatch):
    embed = export.embed
    monkeypatch.setattr(export, "embed", lambda model, ids, learned: embed(model, ids, learned) * (math.nan if ids.shape[1] % 2 else 1))
    r = command(export, shelf / "a.pt", "--out", tmp_path / "new", "--pieces", 6)
    assert r.code == 2 and "probability of nan" in r.err and not (tmp_path / "new").exists()


def test_a_token_that_the_model_has_already_is_refused(export, scripts, shelf, tmp_path, command):
    folder = confident(shelf / "base", tmp_path / "base", True, 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|be:a|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    save_be(tmp_path / "a.pt", scripts, folder, "chat", 1)
    r = command(export, tmp_path / "a.pt", "--out", tmp_path / "new", "--names", "a", "--pieces", 2)
    assert r.code == 2 and "<|be:a|> is a token of this model already" in r.err
    assert command(export, tmp_path / "a.pt", "--out", tmp_path / "new", "--names", "b", "--pieces", 2).code == 0
    assert json.loads((tmp_path / "new/nanobe.json").read_text())["tokens"]["<|be:b|>"]["ids"] == [len(tokenizer)]


def test_a_tokenizer_with_more_ids_than_the_table_has_rows_is_refused(export, scripts, shelf, tmp_path, command):
    """Else the rows between would be padding, with logit 0."""
    folder = confident(shelf / "base", tmp_path / "base", True, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|x|>", "<|y|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    save_be(tmp_path / "a.pt", scripts, folder, "chat", 1)
    r = command(export, tmp_path / "a.pt", "--out", tmp_path / "new")
    assert r.code == 2 and "cannot have a row of its own" in r.err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-C", "disk full"])
def test_a_run_that_breaks_off_leaves_the_old_export_whole(error, export, shelf, tmp_path, command, monkeypatch):
    make = ["--out", tmp_path / "served", "--names", "a", "--pieces", 2]
    assert command(export, shelf / "a.pt", *make).code == 0
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "served").iterdir()}

    def broken(state, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half a file")
        raise error
    with monkeypatch.context() as m:
        m.setattr(export.huggingface_hub, "save_torch_state_dict", broken)
        if error is KeyboardInterrupt:
            with pytest.raises(error):
                command(export, shelf / "a.pt", *make, "--overwrite")
        else:
            r = command(export, shelf / "a.pt", *make, "--overwrite")
            assert r.code == 2 and "No space left on device; nothing there has changed" in r.err and r.err.count("\n") == 1
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "served").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["served", "served.lock"]
    assert command(export, shelf / "b.pt", *make, "--overwrite").code == 0                          # and a whole run replaces it
    assert list(json.loads((tmp_path / "served/nanobe.json").read_text())["tokens"]) == ["<|be:a|>"] and "<|be:a:1|>" in (tmp_path / "served/chat_template.jinja").read_text()
    assert sorted(os.listdir(tmp_path)) == ["served", "served.lock"]


def test_the_check_against_the_base_sees_one_bit(export, shelf, tmp_path, command, monkeypatch):
    save = export.huggingface_hub.save_torch_state_dict
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        def flipped(state, folder, **kwargs):
            state = copy.copy(state) | {key: state[key].clone()}
            state[key].view(torch.int32)[5, 5] ^= 1
            save(state, folder, **kwargs)
        monkeypatch.setattr(export.huggingface_hub, "save_torch_state_dict", flipped)
        with pytest.raises(AssertionError, match=key):
            command(export, shelf / "a.pt", "--out", tmp_path / "served", "--pieces", 2)
        assert os.listdir(tmp_path) == ["served.lock"]


def test_prompt_embeds_holds_the_very_vector(export, shelf, tmp_path, command):
    r = command(export, shelf / "a.pt", "--prompt-embeds", tmp_path / "new/be.json")
    assert r.code == 0 and "--enable-prompt-embeds" in r.out and sorted(os.listdir(tmp_path / "new")) == ["be.json", "be.json.lock"]
    message = json.loads((tmp_path / "new/be.json").read_text())
    part, = message.pop("content")
    assert message == {"role": "system"} and part.pop("type") == "prompt_embeds" and set(part) == {"data"}
    vector = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
    assert vector.shape == (1, 64) and torch.equal(vector, torch.load(shelf / "a.pt", weights_only=True)["vector"])
    again = command(export, shelf / "a.pt", "--prompt-embeds", tmp_path / "new/be.json")
    assert again.code == 2 and "already there" in again.err
    assert command(export, shelf / "a.pt", "--prompt-embeds", tmp_path / "new/be.json", "--overwrite").code == 0
