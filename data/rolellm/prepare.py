"""RoleBench roles as the plain files that stage 2 reads: NAME.txt (the system prompt), NAME.queries.txt (training questions), NAME.test.txt (test questions).

    python data/rolellm/prepare.py                                                    # all roles of ZenMoore/RoleBench, from the Hugging Face hub into data/rolellm/rolebench
    python data/rolellm/prepare.py --roles "Jack Sparrow" Coriolanus
    python data/rolellm/prepare.py --from rolebench                                   # a folder in RoleBench's own layout; no network
    python stage1_recon.py --prompt data/rolellm/Jack_Sparrow.txt

eval_rolellm.py reads the folder in RoleBench's layout itself and needs none of these files; without --data it takes the one that is fetched here.
The prompt is RoleLLM's template around the role's description; training questions are instructions-eng, test questions the role-specific split of instruction generalization.
"""
import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ["profiles-eng/desc.json", "instructions-eng/role-specific-*.jsonl", "rolebench-eng/instruction-generalization/role_specific/test.jsonl"]
TEMPLATE = ("You are {role}, your description is: {description} Now please answer some questions to accurately show your personality traits! Your speaking style should fully "
            "imitate the personality role assigned to you! Please do not expose that you are an artificial intelligence model or a language model, you must always remember that "
            "you are only assigned one personality role. Don't be verbose or too formal or polite when speaking.")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def fetch(folder):
    """The files of RoleBench that are read here, from the hub; those that are there already are not fetched again."""
    import huggingface_hub
    print(f"fetching ZenMoore/RoleBench into {folder}")
    try:
        huggingface_hub.snapshot_download("ZenMoore/RoleBench", repo_type="dataset", allow_patterns=FILES, local_dir=folder)
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as e:       # the hub's errors of status and of connection are OSErrors
        print(f"prepare.py: cannot fetch ZenMoore/RoleBench from the hub ({type(e).__name__}: {str(e).strip().splitlines()[0]}); "
              "give a folder in its layout with --from", file=sys.stderr)
        sys.exit(2)
    return folder


def write(name, lines):
    path = HERE / name
    tmp = Path(f"{path}.tmp")
    tmp.write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")
    os.replace(tmp, path)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", type=Path, help="a folder in RoleBench's own layout; without it, it is fetched")
    p.add_argument("--roles", nargs="*", help="names as in desc.json; default: all that have questions")
    args = p.parse_args()
    args.folder = args.folder or fetch(HERE / "rolebench")
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
        print(f"prepare.py: {args.folder}: expected RoleBench's layout with this role in it: {e}", file=sys.stderr)
        sys.exit(2)
