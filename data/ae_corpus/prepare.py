"""The texts that [AE] is trained on, as plain jsonl: one {"text": ...} a line, in this folder.

    python data/ae_corpus/prepare.py              # the paper's mix, from the Hugging Face hub (about 1 GB; needs: pip install datasets)
    python data/ae_corpus/prepare.py --offline    # a smaller mix of what lies on this machine, no network

The hub mix is Cosmopedia-WikiHow, PwC and GSM8K. The offline mix is the prose that Python packages ship (README texts and docstrings) and, where --extra
folders hold .jsonl files, the string fields of their rows: GSM8K and RoleBench are read that way.
"""
import argparse, ast, importlib.metadata, json, os, random, re, sys, sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent


def fail(message):
    print(f"prepare.py: {message}", file=sys.stderr)
    sys.exit(2)


def write(name, texts, limit=None):
    """Shuffle (seed 0), drop duplicates, write HERE/name.jsonl whole or not at all."""
    texts = sorted({t.strip() for t in texts if len(t.strip()) >= 200})       # under 200 characters there is no 64-token text in it
    random.Random(0).shuffle(texts)
    path = HERE / f"{name}.jsonl"
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        for t in texts[:limit]:
            f.write(json.dumps({"text": t}, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)
    print(f"{path}: {min(len(texts), limit or len(texts))} texts, {path.stat().st_size / 1e6:.1f} MB")


def readmes():
    """The long description of every package installed beside this Python: prose with some code and tables."""
    for dist in importlib.metadata.distributions():
        body = dist.metadata.get_payload()
        if isinstance(body, str):
            yield from re.split(r"\n(?=#+ |\S[^\n]*\n[=-]{4,}\n)", body)      # one text a section


def docstrings():
    """Docstrings of modules, classes and functions of the standard library and of the installed packages."""
    for root in {sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]}:
        for path in sorted(Path(root).rglob("*.py"))[:20000]:
            if path.stat().st_size > 300_000:
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
                continue                                                      # test files of Python itself are broken on purpose
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    yield ast.get_docstring(node) or ""


def fields(folder):
    """Every row of every .jsonl under `folder`: its string fields, one a paragraph. Files named test*.jsonl are left out: they are for testing."""
    for path in sorted(Path(folder).rglob("*.jsonl")):
        if not path.name.startswith("test"):
            for line in path.open(encoding="utf-8"):
                yield "\n".join(v for v in json.loads(line).values() if isinstance(v, str))


def hub():
    try:
        from datasets import load_dataset
    except ImportError:
        fail("the hub mix needs the datasets package: pip install datasets   (or run with --offline)")
    rows = load_dataset("HuggingFaceTB/cosmopedia", "wikihow", split="train", streaming=True)
    write("wikihow", (r["text"] for r in rows), limit=150_000)
    write("pwc", (r["input"] for r in load_dataset("sggetao/PwC", split="train")))
    write("gsm8k", (f'{r["question"]}\n{r["answer"]}' for r in load_dataset("openai/gsm8k", "main", split="train")))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--offline", action="store_true", help="only what lies on this machine")
    p.add_argument("--extra", nargs="*", default=[], metavar="DIR", help="with --offline: folders of .jsonl files, each row one text")
    args = p.parse_args()
    if missing := [folder for folder in args.extra if not any(fields(folder))]:
        fail(f"--extra: expected folders of .jsonl files, each row one text, found none in {' '.join(missing)}")
    if args.offline:
        write("readmes", readmes())
        write("docstrings", docstrings(), limit=5_000)                          # of some 60,000, so that they do not drown the rest
        for folder in args.extra:
            write(Path(folder).resolve().name, fields(folder))
    else:
        hub()
