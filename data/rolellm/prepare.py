"""RoleBench roles as the plain files that stage 2 reads: NAME.txt (the system prompt), NAME.queries.txt (training questions), NAME.test.txt (test questions).

    python data/rolellm/prepare.py --from rolebench                                   # a folder in RoleBench's own layout; all of its roles
    python data/rolellm/prepare.py --from rolebench --roles "Jack Sparrow" Coriolanus
    python stage1_recon.py --prompt data/rolellm/Jack_Sparrow.txt

RoleBench is on the Hugging Face hub as ZenMoore/RoleBench (huggingface-cli download ZenMoore/RoleBench --repo-type dataset --local-dir rolebench).
The prompt is RoleLLM's template around the role's description; training questions are instructions-eng, test questions the role-specific split of instruction generalization.
"""
import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATE = ("You are {role}, your description is: {description} Now please answer some questions to accurately show your personality traits! Your speaking style should fully "
            "imitate the personality role assigned to you! Please do not expose that you are an artificial intelligence model or a language model, you must always remember that "
            "you are only assigned one personality role. Don't be verbose or too formal or polite when speaking.")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write(name, lines):
    path = HERE / name
    tmp = Path(f"{path}.tmp")
    tmp.write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")
    os.replace(tmp, path)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", required=True, type=Path, help="a folder in RoleBench's own layout")
    p.add_argument("--roles", nargs="*", help="names as in desc.json; default: all that have questions")
    args = p.parse_args()
    try:
        descriptions = json.loads((args.folder / "profiles-eng/desc.json").read_text(encoding="utf-8"))
        test = rows(args.folder / "rolebench-eng/instruction-generalization/role_specific/test.jsonl")
        for role in args.roles or [r for r in descriptions if (args.folder / f"instructions-eng/role-specific-{r}.jsonl").exists()]:
            train = rows(args.folder / f"instructions-eng/role-specific-{role}.jsonl")
            name = role.replace(" ", "_")
            write(f"{name}.txt", [TEMPLATE.format(role=role, description=descriptions[role])])
            write(f"{name}.queries.txt", [r["instruction"] for r in train])
            write(f"{name}.test.txt", [r["question"] for r in test if r["role"] == role])
            print(f"{HERE / name}.txt: {len(train)} training and {sum(r['role'] == role for r in test)} test questions")
    except (OSError, ValueError, KeyError) as e:
        print(f"prepare.py: --from {args.folder}: expected RoleBench's layout with this role in it: {e}", file=sys.stderr)
        sys.exit(2)
