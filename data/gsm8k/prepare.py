"""GSM8K as plain rows {"question": ..., "answer": "... #### gold"} in this folder: train.jsonl and test.jsonl.

    python data/gsm8k/prepare.py                    # openai/gsm8k from the Hugging Face hub; pip install datasets
    python data/gsm8k/prepare.py --from FOLDER      # a folder with train.jsonl and test.jsonl: checked, then copied
    python stage1_recon.py --prompt prompts/gsm8k_8shot.json        # a model that does sums: results/gsm8k.sh MODEL
    python stage2_kd.py --prompt prompts/gsm8k_8shot.json --queries data/gsm8k/queries.jsonl

queries.jsonl holds the first --queries training questions, in the words in which eval_gsm8k.py asks the test questions.
"""
import argparse, json, os, re, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = {"train": 7473, "test": 1319}
# as in eval_gsm8k.py and prompts/gsm8k_8shot.json
WORDING = """Given the following problem, reason and give a final answer to the problem.
Problem: {question}
Your response should end with "The final answer is [answer]" where [answer] is the response to the problem."""


def fail(message):
    print(f"prepare.py: {message}", file=sys.stderr)
    sys.exit(2)


def read(folder, split):
    """The rows of a split, from the folder or from the hub, with their two fields alone."""
    try:
        if folder:
            text = Path(folder, f"{split}.jsonl").read_text(encoding="utf-8-sig")
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            from datasets import load_dataset
            rows = list(load_dataset("openai/gsm8k", "main", split=split))
    except ImportError:
        fail("the hub needs the datasets package: pip install datasets   (or give --from FOLDER)")
    except (OSError, ValueError) as e:
        where = f"--from {folder}, {split}.jsonl" if folder else "openai/gsm8k on the hub"
        fail(f"{where}: cannot be read: {' '.join(str(e).split())}   (--from wants train.jsonl and test.jsonl)")
    for n, row in enumerate(rows, 1):
        fields = [row.get("question"), row.get("answer")] if isinstance(row, dict) else [None]
        texts = all(isinstance(field, str) and field.strip() for field in fields)
        if not texts or not re.search(r"####\s*-?\$?-?[0-9,]*\.?[0-9]+\s*$", fields[1]):
            fail(f'{split}, row {n}: expected the texts "question" and "answer", which ends with #### and a number, '
                 f"found {json.dumps(row)[:100]}")
    if not rows:
        fail(f"{split}: expected questions, found none")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def write(path, rows):
    Path(f"{path}.tmp").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(f"{path}.tmp", path)
    whole = SIZES.get(path.stem, len(rows))
    print(f"{path}: {len(rows)} rows" + f", a part of GSM8K's {whole}" * (len(rows) != whole))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", help="a folder with train.jsonl and test.jsonl; without it, the hub")
    p.add_argument("--queries", type=int, default=1000, help="training questions for stage 2; 0 is all")
    p.add_argument("--out", type=Path, default=HERE, help="where the files go; default: this folder")
    args = p.parse_args()
    splits = {split: read(args.folder, split) for split in SIZES}           # both are checked before either is written
    queries = splits["train"][:args.queries or None]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            write(args.out / f"{split}.jsonl", rows)
        write(args.out / "queries.jsonl", [{"query": WORDING.format(question=r["question"].strip())} for r in queries])
    except OSError as e:
        fail(f"--out {args.out}: cannot be written: {e.strerror}; give another --out")
