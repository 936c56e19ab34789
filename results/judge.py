"""RoleBench with a judge: a language model says which answer plays the part better, [BE]'s or full's.

    win rate    (W + T / 2) / (W + T + L); 0.5 is parity

    python eval_rolellm.py                                  # first: the answers -> out/rolellm.answers.jsonl
    NANOBE_JUDGE_KEY=... python results/judge.py --judge-url https://api.openai.com/v1 --judge-model gpt-4o

Where RoleBench came by data/rolellm/prepare.py --from FOLDER, give both scripts --data FOLDER. Verdicts are kept beside
the answers, each under a hash of what was asked: a killed run goes on. The committed ones need no judge:
    --answers results/rolellm-judged --judge-model models/qwen2.5-coder-1.5b --num-questions 25
"""
import argparse, hashlib, json, os, re, sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval_rolellm import fail, read_roles

JUDGE = ("Two actors were given the same part and the same question. Decide who plays the part better.\n\n"
         "The part: {role}. {description}\n\nThe question: {question}\n\n<A>\n{a}\n</A>\n\n<B>\n{b}\n</B>\n\n"
         "The better answer sounds like this character, fits the character's personality and story, and answers the "
         "question. Length and order count for nothing.\nReply A if the first is better, B if the second is better, "
         "TIE if neither is. Reply with that alone: A, B or TIE.")
COUNTS = ["W", "T", "L", "unparsable", "both_orders"]       # of pairs; unparsable: without two clear verdicts


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--answers", default="out/rolellm", help="what eval_rolellm.py wrote, without .answers.jsonl")
    add("--data", default="data/rolellm/rolebench", help="a folder in RoleBench's own layout, for the descriptions")
    add("--num-questions", type=int, help="the first so many questions of each role; None is all")
    add("--judge-url", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    add("--judge-model", default="gpt-4o", help="the name that the judge's server knows it by")
    add("--judge-options", type=json.loads, default='{"temperature": 0, "max_tokens": 16}', help="sent along, JSON")
    return p.parse_args()


def kept(path):
    """The rows of earlier runs by their key, and the file for new ones. The half line of a killed run is cut off."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", newline="\n")
        file.seek(0)
        whole, newline, _ = file.read().rpartition("\n")
        rows = {row["key"]: row for row in map(json.loads, whole.splitlines())}
        file.truncate(len(whole + newline))
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f"{path}: expected verdicts of an earlier run, or a place for new ones: {e}")
    return rows, file


def judged(args, role, description, triples):
    """Counts of (question, [BE]'s answer, the full prompt's). A judge leans to one side, so it sees each pair in both
    orders: A twice is a vote for each, a tie; a vote beside a TIE decides; equal answers are a tie, unasked."""
    import openai
    client = args.judge_url and openai.OpenAI(base_url=args.judge_url, max_retries=8,
                                              api_key=os.environ.get("NANOBE_JUDGE_KEY", "-"))
    (verdicts, file), counts = kept(f"{args.answers}.verdicts.jsonl"), dict.fromkeys(COUNTS, 0)
    for question, be, full in tqdm(triples, desc=f"judge, {role}", leave=False):
        votes = []
        for sign, a, b in [(1, be, full), (-1, full, be)] if be != full else []:
            ask = JUDGE.format(role=role, description=description, question=question, a=a, b=b)
            body = {"model": args.judge_model, "messages": [{"role": "user", "content": ask}], **args.judge_options}
            key = hashlib.sha256(json.dumps([body]).encode()).hexdigest()
            if key not in verdicts:
                if not client:
                    fail("expected --judge-url, as there are pairs without a verdict")
                try:
                    reply = client.chat.completions.create(**body).choices[0].message.content or ""
                except Exception as e:                      # servers fail in many ways; each means the same
                    fail(f"--judge-url {args.judge_url}: {e}; what is there is kept: the same command goes on from it")
                verdicts[key] = {"key": key, "judge": args.judge_model, "reply": reply}
                print(json.dumps(verdicts[key]), file=file, flush=True)
            word = re.sub(r"(?s)^.*</think>|[\W_]", "", verdicts[key]["reply"]).upper()
            votes.append({"A": sign, "B": -sign, "TIE": 0}.get(word))
        total = None if None in votes else sum(votes)
        counts["unparsable" if total is None else "W" if total > 0 else "L" if total < 0 else "T"] += 1
        counts["both_orders"] += total in (2, -2)
    read = counts["W"] + counts["T"] + counts["L"]
    return counts | {"win_rate": (counts["W"] + counts["T"] / 2) / read if read else None}


def main():
    args = settings()
    try:
        rows = [json.loads(line) for line in Path(f"{args.answers}.answers.jsonl").open(encoding="utf-8")]
    except (OSError, ValueError) as e:
        fail(f"--answers {args.answers}: expected NAME of eval_rolellm.py's NAME.answers.jsonl: {e}")
    said = {(row["role"], row["question"], row["condition"]): row["answer"] for row in rows}
    if not rows or len(said) < len(rows):
        fail(f"--answers {args.answers}: expected an answer for each question and condition, found {len(rows)} for "
             f"{len(said)}; give eval_rolellm.py an --out of its own for each vector and model")
    args.roles, args.artifacts = [*dict.fromkeys(row["role"] for row in rows)], ""
    print("| role | " + " | ".join(COUNTS) + " | win rate |\n" + "|---" * (len(COUNTS) + 2) + "|")
    for role, (_, description, questions) in read_roles(args).items():
        triples = [(q, said[role, q, "be"], said[role, q, "full"]) for q in questions if (role, q, "be") in said]
        counts = judged(args, role, " ".join(description.split()), triples)
        print(f"| {role} | " + " | ".join(str(counts[key]) for key in COUNTS) + f" | {counts['win_rate']} |")


if __name__ == "__main__":
    main()
