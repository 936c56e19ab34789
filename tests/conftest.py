"""Tiny random chat models with the templates of real families, the scripts as modules, and their main() run in this
process: no network, no file outside pytest's temporary folders."""
import os

# before torch is imported; a process that a test starts inherits it
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
               "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}

import contextlib, functools, importlib, io, json, random, runpy, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False      # fp32 on every machine

TEXT = """The harbour of Grimmel Bay wakes before the sun does. By five the fish market is loud, and 37 boats lie along
the quay. A baker called Tom sells 120 loaves a day, at 2.50 each, and he never writes a price down. Answer in two short
sentences, and be kind. How many apples are left if Anna has 18 apples and gives 7 of them away? She has 18 - 7 = 11.
Rice is cooked in twice its volume of water, with a little salt, for 12 minutes. When the water is gone, lift the lid.
The old captain speaks slowly: "Aye, the reef took my ship in 1843." You are a helpful assistant, please tell me why.
To reset the router, hold the small button for 10 seconds, then wait until the light is green or the light is red.
system user assistant question answer, 0 1 2 3 4 5 6 7 8 9, is there always another way to say the same thing?"""
SENTENCES = [s.strip() for s in TEXT.replace("\n", " ").replace("?", ".").split(".") if len(s.split()) > 3]
PROMPT = "You are the old captain. Answer in two short sentences: 1, 2, 37! Never name your ship."
TINY = ["--device", "cpu"]

# --- the templates of real families, each with its trap

CHATML = """{% for m in messages %}DEFAULT{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DEFAULT = """{% if loop.first and m.role != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
# an empty thought before an assistant's last words, and, told not to think, before what it is about to say
QWEN3 = """{% set ns = namespace(asked=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.asked %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPARE = ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPARE]

# name: (model class, its own config, dtype on disk, special tokens, BOS, EOS, template, how words are split)
KINDS = {
    "smol": (transformers.LlamaForCausalLM, {"tie_word_embeddings": True}, torch.float32,
             IM, "<|im_start|>", "<|im_end|>", CHATML.replace("DEFAULT", ""), None),
    "llama3": (transformers.LlamaForCausalLM, {"tie_word_embeddings": False}, torch.float32,
               ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", *SPARE],
               "<|begin_of_text|>", "<|eot_id|>", LLAMA3, SPLIT),
    "qwen2": (transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}, torch.float32,
              IM, None, "<|im_end|>", CHATML.replace("DEFAULT", DEFAULT), SPLIT),
    "qwen3": (transformers.Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 16}, torch.bfloat16,
              IM + ["<think>", "</think>"], None, "<|im_end|>", QWEN3, SPLIT),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, with the default model of models/prepare.py; make test-slow")
    config.addinivalue_line("markers", "serving: starts real servers; make test-serving")


@functools.cache
def build_tokenizer(kind):
    """A byte-level BPE of about 500 tokens. One with a real BOS puts it before a text unless told not to."""
    *_, special, bos, eos, template, split = KINDS[kind]
    bpe, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    bpe.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if split is None else pre.Sequence(
        [pre.Split(tokenizers.Regex(split), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(TEXT.splitlines(), tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    if bos == special[0]:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=eos,
                                                     model_max_length=1024)
    tokenizer.chat_template = template
    return tokenizer


def build_checkpoint(folder, kind, **changes):
    cls, own, dtype, *_ = KINDS[kind]
    tokenizer = build_tokenizer(kind)
    torch.manual_seed(0)
    config = cls.config_class(**{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 1024, "initializer_range": 0.1, **own, **changes})       # 0.1: logits that differ
    cls(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """kind -> folder of a tiny checkpoint."""
    return {kind: build_checkpoint(tmp_path_factory.mktemp("models") / kind, kind) for kind in KINDS}


# --- the scripts

def script(name):
    """A script as a module, "results/table" too."""
    return importlib.import_module(name.replace("/", "."))


def caught(f, *args, **settings):
    """A call that may end the process -> code, out, err."""
    code, out, err = 0, *(io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            f(*args, **settings)
        except SystemExit as e:
            code = e.code or 0
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    return SimpleNamespace(code=code, out=out, err=err)


def main(name, *args, cwd="."):
    """A script's command line, in this process -> code, out, err."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(cwd)
        m.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        if name.endswith("prepare"):                        # these have no main()
            return caught(runpy.run_path, str(ROOT / f"{name}.py"), run_name="__main__")
        return caught(script(name).main)


def refused(r, *words):
    """A user's mistake: exit code 2, and one short line with these words in it."""
    assert r.code == 2 and r.err.count("\n") == 1 and len(r.err) < 1000, r.err
    assert all(word in r.err for word in words), r.err


def run(name, *args, cwd, launcher=()):
    """The real command line, in a process of its own: for what only that can show. It takes five seconds to start."""
    r = subprocess.run([sys.executable, *launcher, ROOT / f"{name}.py", *map(str, args)], cwd=cwd, capture_output=True,
                       text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    return r.stdout


def opened(path):
    return torch.load(path, weights_only=True)


def before(tokenizer, slot, turns):
    """What stands before an answer, with ids in the place of the system message."""
    return script("stage2_kd").chat_ids(tokenizer, [{"role": "system", "content": slot}] + turns)


def plain_logits(model, ids, learned):
    """The reference for every fast path: one row, no cache, no mask, nothing packed -> (T, V)."""
    embeds = script("stage2_kd").embed(model, torch.tensor([ids]), learned)
    return model(inputs_embeds=embeds, use_cache=False).logits[0]


def plain_greedy(model, row, learned, limit, stop=None):
    """The whole row again for each token of the answer, up to and with an end of turn."""
    said, stop = [], model.generation_config.eos_token_id if stop is None else stop
    while len(said) < limit and not (said and said[-1] in stop):
        said.append(plain_logits(model, row + said, learned)[-1].argmax().item())
    return said


def plain_measure(model, full, fed, learned, limit):
    """The model answers the rows of full, and reads the answers behind the rows of fed -> KL in nats a token, top-1."""
    kl, same, tokens = 0.0, 0, 0
    for row, other in zip(full, fed):
        said = plain_greedy(model, row, learned, limit)
        logits = [plain_logits(model, ids + said, learned)[-len(said) - 1:-1] for ids in (row, other)]
        teacher, student = (F.log_softmax(z, -1) for z in logits)
        kl += F.kl_div(student, teacher, log_target=True, reduction="sum").item()
        same += (student.argmax(-1) == teacher.argmax(-1)).sum().item()
        tokens += len(said)
    return kl / tokens, same / tokens


def load_tiny(checkpoints, kind):
    return script("stage2_kd").load_frozen(str(checkpoints[kind]), "cpu")


@pytest.fixture(scope="session", params=KINDS)
def loaded(request, checkpoints):
    """(model in fp32, tokenizer) through the scripts' own load_frozen; a test that asks for it runs once a family."""
    return load_tiny(checkpoints, request.param)


@pytest.fixture(scope="session")
def smol(checkpoints):
    """The tied Llama alone, for what does not depend on the family."""
    return load_tiny(checkpoints, "smol")


def fill(folder):
    """A prompt, queries for it, and a corpus of few words, so that a tiny model can learn to copy it a little."""
    folder.mkdir()
    words, rng = "the harbour of Grimmel Bay wakes before the sun does".split(), random.Random(0)
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "p.txt").write_text(PROMPT)
    (folder / "p.queries.txt").write_text("".join(f"{s}?\n" for s in SENTENCES))
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder, which is the current one."""
    monkeypatch.chdir(fill(tmp_path / "work"))
    return tmp_path / "work"


def artifact(model, k=1, seed=0, **changes):
    """What a stage saves: k vectors and [AE], noise around the rows of the embedding table."""
    table, g = model.get_input_embeddings().weight, torch.Generator().manual_seed(seed)
    vectors = table.mean(0) + 3 * table.std(0) * torch.randn(k + 1, 64, generator=g)
    return {"kind": "be", "stage": "kd", "vector": vectors[:k], "ae": vectors[k:], "tokens": 40,
            "messages": [{"role": "system", "content": PROMPT}], "config": {"prompt": "p.txt"}, "metrics": {"n": 3},
            "model": {"name": model.name_or_path, "fingerprint": model.fingerprint}, "history": [],
            **changes}


@pytest.fixture(scope="session")
def vectors(smol, tmp_path_factory):
    """A folder with ae.pt, recon.pt, be.pt and two.pt (k 2) for smol."""
    folder = tmp_path_factory.mktemp("vectors")
    torch.save(artifact(smol[0], seed=1, kind="ae"), folder / "ae.pt")
    torch.save(artifact(smol[0], seed=2, stage="recon"), folder / "recon.pt")
    torch.save(artifact(smol[0], seed=3), folder / "be.pt")
    torch.save(artifact(smol[0], k=2), folder / "two.pt")
    return folder
