"""GSM8K as the plain jsonl that the scripts read: train.jsonl and test.jsonl, a row {"question": ..., "answer": ... #### gold}, in this folder.

    python data/gsm8k/prepare.py                    # openai/gsm8k from the Hugging Face hub; needs: pip install datasets
    python data/gsm8k/prepare.py --from FOLDER      # a folder with train.jsonl and test.jsonl: checked, then copied
    python stage2_kd.py --prompt prompts/gsm8k_8shot.json --queries data/gsm8k/queries.jsonl

queries.jsonl holds training questions for stage 2, the first --queries of the training split, in the wording in which eval_gsm8k.py asks the test questions.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = {"train": 7473, "test": 1319}
WORDING = ("Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\n"      # as in eval_gsm8k.py and prompts/gsm8k_8shot.json
           'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.')


def fail(message):
    print(f"prepare.py: {message}", file=sys.stderr)
    sys.exit(2)


def hub(split):
    try:
        from datasets import load_dataset
    except ImportError:
        fail("the hub needs the datasets package: pip install datasets   (or give --from FOLDER)")
    try:
        return list(load_dataset("openai/gsm8k", "main", split=split))
    except (OSError, ValueError) as e:
        fail(f"openai/gsm8k cannot be fetched: {str(e).strip().splitlines()[0]}   (or give --from FOLDER)")


def local(folder, split):
    path = Path(folder, f"{split}.jsonl")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as e:
        fail(f"--from {folder}: expected a folder with train.jsonl and test.jsonl, but {path} cannot be read: {e.strerror}")
    except ValueError as e:
        fail(f"{path}: expected a json object a line, in UTF-8: {e}")


def checked(rows, split):
    """The rows with their two fields alone; exits with one line at the first that is not a question with a gold number."""
    for n, row in enumerate(rows, 1):
        fields = [row.get("question"), row.get("answer")] if isinstance(row, dict) else [None]
        if not all(isinstance(x, str) and x.strip() for x in fields) or not re.search(r"####\s*-?\$?-?[0-9,]*\.?[0-9]+\s*$", fields[1]):
            fail(f'{split}, row {n}: expected the texts "question" and "answer", which ends with #### and a number, found {json.dumps(row)[:100]}')
    if not rows:
        fail(f"{split}: expected questions, found none")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def write(path, rows):
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(f"{path}.tmp", path)
    whole = SIZES.get(path.stem, len(rows))
    print(f"{path}: {len(rows)} rows" + f", a part of GSM8K's {whole}" * (len(rows) != whole))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", help="a folder with train.jsonl and test.jsonl; without it, the hub")
    p.add_argument("--queries", type=int, default=1000, help="training questions for stage 2; 0 is all")
    p.add_argument("--out", type=Path, default=HERE, help="where the files go; default: this folder")
    args = p.parse_args()
    if args.queries < 0:
        fail(f"--queries: expected a number from 0, found {args.queries}")
    splits = {split: checked(local(args.folder, split) if args.folder else hub(split), split) for split in SIZES}       # both are checked before either is written
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            write(args.out / f"{split}.jsonl", rows)
        write(args.out / "queries.jsonl", [{"query": WORDING.format(question=row["question"].strip())} for row in splits["train"][:args.queries or None]])
    except OSError as e:
        fail(f"--out {args.out}: cannot be written ({e.strerror}); give another --out")
