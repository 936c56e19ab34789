"""infer.py gives the plain greedy answer, and a chat goes on. export.py: each way is opened by what it is for, and says
what the hook says; nothing else about the model moves."""
import base64, io, json, os, re, shutil, subprocess, sys

import pytest
import safetensors.torch
import torch
import transformers

from conftest import PROMPT, ROOT, SENTENCES, TINY, artifact, before, main, opened, plain_greedy, refused, script

infer, USER = script("infer"), [{"role": "user", "content": "How many apples are left?"}]
LATER = [*USER, {"role": "assistant", "content": "Aye."}, {"role": "user", "content": "Why is that?"}]


def test_compare_feeds_the_prompt_the_slot_and_nothing(smol, checkpoints, vectors, work):
    """And answers greedily, whatever the folder's own generation config says."""
    model, tokenizer = smol
    turns = [{"role": "user", "content": "How many apples are left?"}]
    fed = {"full prompt": script("infer").chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns),
           "[BE]": before(tokenizer, [-1, -2], turns),
           "no prompt": before(tokenizer, [], turns)}
    folder = shutil.copytree(checkpoints["smol"], work / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    own = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(config | own))
    r = main("infer", "--be", vectors / "two.pt", "--query", "How many apples are left?", "--compare",
             "--max-new-tokens", 8, "--model", folder, *TINY)
    assert r.code == 0, r.err
    parts = re.split(r"^--- (.+)\n", r.out, flags=re.M)
    answers = dict(zip(parts[1::2], parts[2::2]))
    assert list(answers) == list(fed)
    for condition, ids in fed.items():
        said = plain_greedy(model, ids, opened(vectors / "two.pt")["vector"], 8)
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answers[condition].startswith(f"{text}\n"), condition
        assert f"{len(ids)} tokens fed, {len(said)} answered" in answers[condition]
    assert "[BE][BE]" in parts[0]                           # what is fed, shown


def test_a_chat_keeps_its_turns_on_any_terminal_and_goes_on_after_a_message_that_is_too_long(vectors, work):
    """A real process with real bytes: a query that is no UTF-8, one that is too long, and an output of ASCII alone."""
    command = [sys.executable, ROOT / "infer.py", "--be", vectors / "be.pt", "--max-new-tokens", "9", *TINY]
    typed = "Who are you?\n\nWho are you?\n日本?\n".encode() + b"x" * 3000 + b"\ncaf\xe9?\n"
    r = subprocess.run(command, input=typed, capture_output=True, cwd=work, timeout=300,
                       env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = r.stdout.decode("ascii"), r.stderr.decode()
    assert r.returncode == 0 and "Traceback" not in err and "tokens fit, not 3" in err and "shorten 'xxx" in err, err
    fed = [int(n) for n in re.findall(r"(\d+) tokens fed", out)]
    assert len(fed) == 4 and fed == sorted({*fed}) and fed[-1] < 1000


# --- export.py

@pytest.fixture
def case(loaded, work):
    """be.pt of three vectors or, where the head is tied, of one -> its vector, model, tokenizer."""
    model, tokenizer = loaded
    be = artifact(model, 1 if model.config.tie_word_embeddings else 3)
    torch.save(be, "be.pt")
    return be["vector"], model, tokenizer


def fed(tokenizer, system, turns):
    """What an engine feeds: the template's own ids of a chat with this system message."""
    messages = [{"role": "system", "content": system}] + turns
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=False)


def same_as_hook(case, served, tokenizer, about, turns):
    """The message of about is fed where the hook has its slots, and gives the hook's logits."""
    vector, model, own = case
    slots = before(own, [-1 - i for i in range(len(vector))], turns)
    ids = fed(tokenizer, about["system message"], turns)
    assert ids == [about["ids"][-1 - i] if i < 0 else i for i in slots]
    with torch.no_grad():
        logits = model(inputs_embeds=infer.embed(model, torch.tensor([slots]), vector)).logits
        found = served(torch.tensor([ids])).logits[..., :logits.shape[-1]]
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


def no_secret(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"Never name your ship" not in file.read_bytes(), f"{file}: the prompt's text is in it"


def test_the_adapter_opened_by_peft_equals_inputs_embeds(case, work):
    peft, (vector, model, tokenizer) = pytest.importorskip("peft"), case
    r = main("export", "be.pt", "--adapter", "served/captain")
    assert r.code == 0, r.err
    about, = json.loads((work / "served/captain/nanobe.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(about["base model"], dtype=torch.float32)
    others = [torch.tensor([fed(tokenizer, text, USER)]) for text in ("Be kind.", " ".join(SENTENCES))]
    with torch.no_grad():
        plain = [base(ids).logits for ids in others]
        adapted = peft.PeftModel.from_pretrained(base, work / "served/captain").eval()
        for ids, before in zip(others, plain):              # other text is as it was
            torch.testing.assert_close(adapted(ids).logits, before, atol=1e-5, rtol=1e-5)
    for turns in (USER, LATER):
        same_as_hook(case, adapted, tokenizer, about, turns)
    used = {i for text in (*SENTENCES, PROMPT) for i in fed(tokenizer, text, LATER)}
    assert not used & {*about["ids"]} and len({*about["ids"]}) == len(vector)
    assert not {*about["ids"]} & {*model.generation_config.eos_token_id}
    weights = safetensors.torch.load_file("served/captain/adapter_model.safetensors")
    assert sorted(map(len, weights.values())) == sorted([len(vector), 64])      # A and B, and no table
    assert about["system message"] in r.out and "captain" in r.out
    told = "--enable-lora" if model.config.model_type != "qwen2" else "export with --prompt-embeds or --out"
    assert told in r.out                                    # vLLM has none for Qwen2: no line to start it, no curl
    assert all((word in r.out) == (told == "--enable-lora") for word in ("--enable-lora", "curl"))
    no_secret(work / "served")


def test_the_checkpoint_is_an_ordinary_model_that_answers_as_the_hook_does(case, work):
    vector, model, tokenizer = case
    r = main("export", "be.pt", "--out", "model", "--dtype", "float32")
    assert r.code == 0, r.err
    about, = json.loads((work / "model/nanobe.json").read_text())
    served = transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    read, old = transformers.AutoTokenizer.from_pretrained(work / "model"), len(model.lm_head.weight)
    for turns in (USER, LATER):
        same_as_hook(case, served, read, about, turns)
    assert served.generation_config.eos_token_id == model.generation_config.eos_token_id
    state, base = served.state_dict(), model.state_dict()
    for name, w in base.items():                            # every old weight is as it was, to the last bit
        assert torch.equal(state[name][:len(w)], w), name
    assert torch.equal(state["model.embed_tokens.weight"][about["ids"]], vector)
    for text in SENTENCES[:3]:                              # and no engine will ever say the new token
        with torch.no_grad():
            p = served(torch.tensor([fed(read, text, USER)])).logits[0].softmax(-1)
        assert p[:, about["ids"]].max() <= 1.01 / old and not {*p.argmax(-1).tolist()} & {*about["ids"]}
    assert fed(read, "Be kind.", LATER) == fed(tokenizer, "Be kind.", LATER)
    config = json.loads((work / "model/config.json").read_text())               # older readers' names beside the new
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"] and not config["tie_word_embeddings"]
    no_secret(work / "model")


def test_prompt_embeds_is_the_vector_in_a_message(vectors, work):
    assert main("export", vectors / "two.pt", "--prompt-embeds", "be.json").code == 0
    message = json.loads((work / "be.json").read_text())
    part, = message["content"]
    assert message["role"] == "system" and part["type"] == "prompt_embeds"
    assert torch.equal(opened(io.BytesIO(base64.b64decode(part["data"]))), opened(vectors / "two.pt")["vector"])


def test_several_artifacts_are_a_folder_each_and_an_earlier_export_is_replaced_when_asked(vectors, work):
    for name in ("one", "two"):
        shutil.copy(vectors / "be.pt", f"{name}.pt")
    for extra, code in [([], 0), ([], 2), (["--overwrite"], 0)]:
        assert main("export", "one.pt", "two.pt", "--adapter", "served", *extra).code == code
        assert [p.name for p in work.glob("*served*")] == ["served"]
    assert {p.parent.name for p in work.glob("served/*/adapter_config.json")} == {"one", "two"}
    abouts = json.loads((work / "served/nanobe.json").read_text())
    assert [about["name"] for about in abouts] == ["one", "two"]
    assert main("export", "one.pt", "--adapter", "served/mine").code == 0       # another export, in the same folder
    refused(main("export", "one.pt", "two.pt", "--adapter", "served", "--overwrite"), "mine", "another name")
    assert (work / "served/mine/adapter_config.json").exists()


@pytest.mark.parametrize("arguments, words", [
    (["be.pt", "--out", "thesis"], ["thesis", "already"]),
    (["be.pt", "--adapter", "thesis", "--overwrite"], ["thesis", "already"]),
    (["be.pt", "--adapter", "new", "--token", "ship"], ["unused", "--out"]),
    (["be.pt", "recon.pt", "--prompt-embeds", "new.json"], ["--prompt-embeds"])])
def test_what_cannot_be_exported_is_refused_and_nothing_is_overwritten(arguments, words, vectors, work):
    shutil.copytree(vectors, work, dirs_exist_ok=True)
    (work / "thesis").mkdir()
    (work / "thesis/chapter1.txt").write_text("Years of work.")
    refused(main("export", *arguments), *words)
    assert [p.name for p in (work / "thesis").iterdir()] == ["chapter1.txt"] and not [*work.glob("new*")]
