"""RoleBench's roles as the plain files of stages 1 and 2: NAME.txt, the system prompt, NAME.queries.txt, the training
questions, and NAME.test.txt, the test questions. The prompt is RoleLLM's, around the role's description.

    python data/rolellm/prepare.py                              # all roles of ZenMoore/RoleBench, from the hub
    python data/rolellm/prepare.py --roles "Jack Sparrow" Coriolanus
    python data/rolellm/prepare.py --from rolebench             # a folder in RoleBench's own layout; no network
    python stage1_recon.py --prompt data/rolellm/Jack_Sparrow.txt

What is fetched lies in data/rolellm/rolebench, where eval_rolellm.py looks for the test questions' references.
"""
import argparse, json, os, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ABOUT, TRAIN = "profiles-eng/desc.json", "instructions-eng/role-specific-{role}.jsonl"
TEST = "rolebench-eng/instruction-generalization/role_specific/test.jsonl"
PROMPT = ("You are {role}, your description is: {description} Now please answer some questions to accurately show "
          "your personality traits! Your speaking style should fully imitate the personality role assigned to you! "
          "Please do not expose that you are an artificial intelligence model or a language model, you must always "
          "remember that you are only assigned one personality role. Don't be verbose or too formal or polite when "
          "speaking.")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write(path, texts):
    """One text a line, each once, in the order of the rows. A file that was mended by hand stays."""
    lines = dict.fromkeys(" ".join(text.split()) for text in texts)
    text = "".join(line + "\n" for line in lines)
    if Path(path).exists() and Path(path).read_text(encoding="utf-8") != text:
        print(f"{path} stays: it holds something else than RoleBench; move it away for that")
    else:
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        os.replace(f"{path}.tmp", path)
    return len(lines)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", type=Path, help="a folder in RoleBench's own layout; else it is fetched")
    p.add_argument("--roles", nargs="*", help="names as in desc.json; else all that have questions")
    args = p.parse_args()
    folder = args.folder or HERE / "rolebench"
    try:
        if not args.folder:
            import huggingface_hub
            print(f"fetching ZenMoore/RoleBench into {folder}")
            huggingface_hub.snapshot_download("ZenMoore/RoleBench", repo_type="dataset", local_dir=folder,
                                              allow_patterns=[ABOUT, TRAIN.format(role="*"), TEST])
        about, test = json.loads((folder / ABOUT).read_text(encoding="utf-8")), rows(folder / TEST)
        train = {role: folder / TRAIN.format(role=role) for role in about}
        if unknown := {*(args.roles or [])} - {*about}:
            raise ValueError(f"no {sorted(unknown)}; there are {sorted(about)}")
        for role in args.roles or filter(lambda role: train[role].exists(), about):
            base = HERE / role.replace(" ", "_")
            write(f"{base}.txt", [PROMPT.format(role=role, description=about[role])])
            trained = write(f"{base}.queries.txt", [row["instruction"] for row in rows(train[role])])
            tested = write(f"{base}.test.txt", [row["question"] for row in test if row["role"] == role])
            print(f"{base}.txt: {trained} training and {tested} test questions")
    except Exception as e:          # the hub and a folder of another layout raise many types
        why = " ".join(f"{type(e).__name__}: {e}".split())
        print(f"prepare.py: {folder}: expected RoleBench's layout with these roles in it: {why}; --from takes a folder "
              "that is here already", file=sys.stderr)
        sys.exit(2)
