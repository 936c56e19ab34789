"""The texts that [AE] is trained on: .jsonl files in this folder, one {"text": ...} a line.

    python data/ae_corpus/prepare.py              # the paper's mix (WikiHow, PwC, GSM8K), 1 GB; pip install datasets
    python data/ae_corpus/prepare.py --offline    # what lies on this machine: READMEs and docstrings of packages
    python data/ae_corpus/prepare.py --offline --extra data/gsm8k                   # and rows of .jsonl files
"""
import argparse, ast, importlib.metadata, importlib.util, json, os, random, re, sysconfig, warnings
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent


def write(name, texts, limit=None):
    """Each text once, shuffled with seed 0; the file is there whole or not at all."""
    texts = sorted({t.strip() for t in texts if len(t.strip()) >= 200})     # stage 0 leaves shorter ones out
    random.Random(0).shuffle(texts)
    lines = [json.dumps({"text": t}) + "\n" for t in texts[:limit]]
    path = HERE / f"{name}.jsonl"
    Path(f"{path}.tmp").write_text("".join(lines), encoding="utf-8")
    os.replace(f"{path}.tmp", path)
    print(f"{path}: {len(lines)} texts, {path.stat().st_size / 1e6:.1f} MB")


def readmes():
    """The long description of every package installed beside this Python, a text for each section of it."""
    for package in importlib.metadata.distributions():
        yield from re.split(r"\n(?=#+ |\S[^\n]*\n[=-]{4,}\n)", str(package.metadata.get_payload()))


def docstrings():
    """Those of modules, classes and functions of the standard library and the installed packages."""
    warnings.simplefilter("ignore")                             # ast.parse tells of each odd escape that it meets
    for name in ("stdlib", "purelib"):
        for path in tqdm(sorted(Path(sysconfig.get_path(name)).rglob("*.py"))[:20_000], desc=name):
            try:
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                        yield ast.get_docstring(node) or ""
            except (SyntaxError, ValueError, RecursionError):
                continue                                        # Python's own tests have files broken on purpose


def rows(folder):
    """The string fields of every row of every .jsonl file in folder, but for test*.jsonl, which are for testing."""
    for path in sorted(p for p in Path(folder).rglob("*.jsonl") if not p.name.startswith("test")):
        for line in filter(str.strip, path.open(encoding="utf-8")):
            yield "\n".join(v for v in json.loads(line).values() if isinstance(v, str))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--offline", action="store_true", help="only what lies on this machine")
    p.add_argument("--extra", nargs="*", default=[], metavar="DIR", help="with --offline: folders of .jsonl files")
    args = p.parse_args()
    for folder in args.extra:
        if not any(rows(folder)):
            p.exit(2, f"prepare.py: --extra {folder}: expected .jsonl files with text in their rows, found none\n")
    for folder in args.extra:
        write(Path(folder).resolve().name, rows(folder))
    if args.offline:
        write("readmes", readmes())
        write("docstrings", docstrings(), limit=5_000)                      # of some 60,000: the rest would drown
    else:
        if not importlib.util.find_spec("datasets"):
            p.exit(2, "prepare.py: the paper's mix needs: pip install datasets   (or run with --offline)\n")
        from datasets import load_dataset as hub
        write("wikihow", (r["text"] for r in hub("HuggingFaceTB/cosmopedia", "wikihow", split="train")), limit=150_000)
        write("pwc", (r["input"] for r in hub("sggetao/PwC", split="train")))
        write("gsm8k", (f"{r['question']}\n{r['answer']}" for r in hub("openai/gsm8k", "main", split="train")))
