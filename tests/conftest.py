"""Tiny random chat models, built on the spot, and the scripts as modules. No network, no file outside pytest's temporary folder."""
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")     # before torch is imported; processes that tests start inherit it

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
torch.set_num_threads(1)

TEXT = """The harbour of Grimmel Bay wakes before the sun does. By five the fish market is loud, and 37 boats lie three deep along the quay. A baker called Tom
sells 120 loaves a day, at 2.50 each, and he never writes a price down. You are a helpful assistant. Answer in two short sentences, and be kind.
How many apples are left if Anna has 18 apples and gives 7 of them away? She has 18 - 7 = 11 apples. What is the capital of France? It is Paris.
Rice is cooked in twice its volume of water, with a little salt, for 12 minutes. Do not lift the lid. When the water is gone, take the pot from the fire.
The old captain speaks slowly: "Aye, the reef took my ship in 1843, and the sea took my ear. Ask me again tomorrow, friend." Nobody asked him again.
To reset the router, hold the small button for 10 seconds, then wait until the light is green. If it stays red, write to support and name your order number.
system user assistant question answer please tell me why because there is always another way to say the same thing, 0 1 2 3 4 5 6 7 8 9, and then some more."""

SENTENCES = [s.strip() for s in TEXT.replace("\n", " ").replace("?", ".").split(".") if len(s.split()) > 3]

CHATML = ("{% for message in messages %}DEFAULT{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
DEFAULT = "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
LLAMA3 = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# name: (model class, its own config, dtype on disk, special tokens with BOS and EOS, template, word splitting)
KINDS = {
    "smol": (transformers.LlamaForCausalLM, dict(tie_word_embeddings=True), torch.float32,
             ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", CHATML.replace("DEFAULT", DEFAULT), None),
    "qwen": (transformers.Qwen3ForCausalLM, dict(tie_word_embeddings=False, head_dim=16), torch.bfloat16,
             ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", CHATML.replace("DEFAULT", ""), LLAMA3_SPLIT.replace("{1,3}", "")),
    "llama3": (transformers.LlamaForCausalLM, dict(tie_word_embeddings=False), torch.float32,
               ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", LLAMA3, LLAMA3_SPLIT),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs the real default model of models/prepare.py, and minutes; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "serving: starts real servers, vLLM in a venv of its own (3 GB); make test-serving")


def build_tokenizer(special, bos, eos, template, split):
    """A byte-level BPE of about 500 tokens. As in Llama 3, one that has a BOS of its own puts it in front of a text unless it is told not to."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    bpe.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if split is None else pre.Sequence(
        [pre.Split(tokenizers.Regex(split), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(TEXT.splitlines(), trainer)
    if bos == special[0]:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def build_checkpoint(folder, name, seed=0):
    cls, own, dtype, special, bos, eos, template, split = KINDS[name]
    tokenizer = build_tokenizer(special, bos, eos, template, split)
    torch.manual_seed(seed)
    config = cls.config_class(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, max_position_embeddings=1024, initializer_range=0.1, **own)     # 0.1: logits that are not flat
    cls(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> folder of a tiny checkpoint. smol: Llama, tied, fp32, a default system prompt. qwen: Qwen3, untied, bf16, no BOS. llama3: Llama, untied, fp32, a real BOS."""
    return {name: build_checkpoint(tmp_path_factory.mktemp("models") / name, name) for name in KINDS}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scripts():
    """The stage scripts as modules; they are no package, and none imports another."""
    return SimpleNamespace(ae=load_script("stage0_ae"), recon=load_script("stage1_recon"), kd=load_script("stage2_kd"), infer=load_script("infer"))


@pytest.fixture(scope="session", params=list(KINDS))
def loaded(request, checkpoints, scripts):
    """(name, model in fp32, tokenizer), through the scripts' own load_frozen; each test that asks for it runs once a model."""
    return request.param, *scripts.kd.load_frozen(str(checkpoints[request.param]), CPU, torch.float32, "eager")


@pytest.fixture(scope="session")
def smol(checkpoints, scripts):
    """(model, tokenizer) of the tied Llama alone, for what does not depend on the model."""
    return scripts.kd.load_frozen(str(checkpoints["smol"]), CPU, torch.float32, "eager")


@pytest.fixture(scope="session")
def owner(scripts, checkpoints, smol):
    """What an artifact says of the tied Llama that it belongs to."""
    return {"name": str(checkpoints["smol"]), "revision": None, "fingerprint": scripts.kd.fingerprint(smol[0]), "d": 64}


@pytest.fixture
def command(scripts, monkeypatch, capsys):
    """command(module, *arguments) runs a script's main() in this process -> SimpleNamespace(code, out, err)."""
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            module.main()
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run
