"""Rules kept: which rules of prompts/desk.txt an answer keeps, with the prompt, with [BE], with neither.

    full prompt             the prompt of the help desk, then the question
    FILE.pt                 [BE] of this artifact
    no prompt               an empty system message
    default system prompt   what the template puts there by itself
    prompt cut to a tenth   the prompt's first tokens
    compressed prompt       the text of --compressed, made elsewhere: LLMLingua's, for one, needs models of its own

    python results/rules.py --be out/k1.pt out/k4.pt            # -> results/rules.jsonl, .json and .md
    python results/rules.py --be out/k1.pt --held-out --only "full prompt" out/k1.pt --out out/held-out.jsonl

Code decides, no judge. A rule is asked only of answers that it applies to: "about" in the queries' rows says which.
Greedy, 128 tokens. Answers are saved as they come, and the same command goes on after a kill. --held-out asks the
training questions that stage 2 held out: settings are chosen on those, never on the test questions.
"""
import argparse, hashlib, json, math, os, re, sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stage2_kd import answer, beside, chat_ids, fail, load, load_frozen, prompt_ids, read_prompt

PROMPT = "prompts/desk.txt"                             # whose rules and facts stand below

COMPETITORS = "StoreKing|BoxCastle|Lock and Go"
CATEGORIES = {"PRICE", "ACCESS", "BOOKING", "URGENT", "OTHER"}
FACTS = {"gate": {"06:00", "22:00"}, "desk": {"08:30", "17:30"}, "address": "14 Quay Lane", "small": "39",
         "medium": "67", "large": "112", "deposit": "80", "late": "15", "key": "7", "van": "25",
         "stay": r"(2|two|zwei|deux|dos) (mo|me)\w+", "notice": r"(14|fourteen|vierzehn|quatorze|catorce)"}
MONEY = {"small", "medium", "large", "deposit", "late", "key", "van"}
FIXED = ("Harbour Box desk.", "Next step:", "Your things are safe with us.", "Tax is included.", "Call 555 0199 now.",
         "The desk may not speak about this.", "We speak only for Harbour Box.", "We are sorry to see you go.")
COMMON = {"de": "der die das den dem und ist sie ihre ihren nicht ein eine von zu mit am im uns bitte",
          "fr": "le la les et est vous votre ne pas un une de du des pour à nous avec",
          "es": "el la los las y es su usted no un una de del para en con nos por",
          "en": "the a is and you your of to for from in it at we our can not with"}
STYLE = {
    "opening words": lambda a, row: a.startswith("Harbour Box desk."),
    "one category of five": lambda a, row: [c in CATEGORIES for c in re.findall(r"\[(.*?)\]", a)] == [True],
    "next step": lambda a, row: "Next step:" in a,
    "closing words": lambda a, row: a.endswith("Your things are safe with us."),
    "one line": lambda a, row: "\n" not in a,
    "at most fifty words": lambda a, row: len(a.split()) <= 50,
    "no exclamation mark": lambda a, row: "!" not in a,
    "box, not unit": lambda a, row: not re.search(r"\bunits?\b", a, re.I),
    "currency code": lambda a, row: re.search(r"EUR \d", a) and not re.search("[$€£]|(?i:euros?|dollars?)\\b", a),
    "tax sentence": lambda a, row: "Tax is included." in a,
    "24-hour clock": lambda a, row: re.search(r"\d\d:\d\d", a) and not re.search(r"\d\s*[ap]\.?m\b", a, re.I),
    "refusal": lambda a, row: "The desk may not speak about this." in a,
    "no competitor's name": lambda a, row: not re.search(COMPETITORS, a, re.I),
    "only for ourselves": lambda a, row: "We speak only for Harbour Box." in a,
    "category of emergencies": lambda a, row: "[URGENT]" in a,
    "emergency": lambda a, row: "Call 555 0199 now." in a,
    "farewell": lambda a, row: "We are sorry to see you go." in a,
    "language of the question": lambda a, row: language(a) in row["about"],
}
# the rules of some questions only; the others apply to all. Of another customer ("person") the full prompt speaks too
# often for a rule, and such a question counts for the others
APPLIES = {
    "box, not unit": lambda row: re.search(r"\bunits?\b", row["query"]),
    "currency code": lambda row: MONEY & {*row["about"]},
    "tax sentence": lambda row: MONEY & {*row["about"]},
    "24-hour clock": lambda row: {"gate", "desk"} & {*row["about"]},
    "refusal": lambda row: {"law", "tax"} & {*row["about"]},
    "no competitor's name": lambda row: "rival" in row["about"],
    "only for ourselves": lambda row: "rival" in row["about"],
    "category of emergencies": lambda row: "urgent" in row["about"],
    "emergency": lambda row: "urgent" in row["about"],
    "farewell": lambda row: "leave" in row["about"],
    # where there is something to say beside the fixed words
    "language of the question": lambda row: {"de", "fr", "es"} & {*row["about"]} and FACTS.keys() & {*row["about"]},
}


def language(text):
    """The language whose small words are the most in a text, without the sentences that stay in English."""
    for fixed in FIXED:
        text = text.replace(fixed, " ")
    words = re.findall(r"\w+", text.lower())
    counts = {name: sum(w in common.split() for w in words) for name, common in COMMON.items()}
    return max(counts, key=counts.get) if any(counts.values()) else None


def right(fact, text):
    """Does a text hold the fact's value? Of hours: at least one of the two, and no other."""
    if fact in ("gate", "desk"):
        times = {*re.findall(r"\d\d:\d\d", text)}
        return bool(times) and times <= FACTS[fact]
    return bool(re.search(rf"\b{FACTS[fact]}\b", text, re.I))


def verdicts(text, row):
    """Which rules an answer keeps and which facts it has right, of those that its question asks for -> {name: bool}"""
    style = {name: bool(test(text, row)) for name, test in STYLE.items() if APPLIES.get(name, bool)(row)}
    return style, {fact: right(fact, text) for fact in FACTS if fact in row["about"]}


def wilson(k, n, z=1.959964):
    """A rate's 95% interval: inside [0, 1], and with a width even where k is 0 or n."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return [max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))]


def paired(kept, full, z=1.959964):
    """Rate less that of the full prompt on the same questions, 95% interval: half a question is added to each of the
    four cells (Agresti and Min, 2005), so that ten questions which all agree do not give a width of 0."""
    n, won, lost = len(kept), sum(a > b for a, b in zip(kept, full)), sum(a < b for a, b in zip(kept, full))
    d, half = (won - lost) / (n + 2), z * math.sqrt(won + lost + 1 - (won - lost) ** 2 / (n + 2)) / (n + 2)
    return [max(-1.0, d - half), min(1.0, d + half)]


def retention(condition, full):
    """Mean over rules of the rates, over that of the full prompt; 95% interval over questions, drawn anew 2,000 times.
    condition, full: a dict of verdicts a question."""
    def mean(kept):                                         # (questions, rules); nan where a rule does not apply
        n = (~np.isnan(kept)).sum(0)
        return (np.nansum(kept, 0)[n > 0] / n[n > 0]).mean()

    names = sorted({name for v in full for name in v})
    a, b = (np.array([[v.get(name, np.nan) for name in names] for v in x], float) for x in (condition, full))
    drawn = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    ratios = [mean(a[i]) / (mean(b[i]) or np.nan) for i in drawn]
    return {"mean": mean(a), "retention": mean(a) / (mean(b) or np.nan),
            "retention_95": np.nanquantile(ratios, [0.025, 0.975]).tolist()}


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--be", nargs="*", default=[], help="artifacts of this prompt and model, each a condition")
    add("--held-out", action="store_true", help="ask what stage 2 held out instead, for artifacts of one --seed")
    add("--n", type=int, help="the first n questions; None is all")
    add("--only", nargs="*", help="these conditions only, the full prompt among them; None is all")
    add("--compressed", help="a text file, the prompt compressed by other means")
    add("--model", default="models/qwen2.5-coder-1.5b", help="hub name or folder")
    add("--limit", type=int, default=128, help="an answer is cut here")
    add("--batch", type=int, default=40, help="questions between two saves")
    add("--out", default="results/rules.jsonl", help="a row an answer; the tables go beside it, as .json and .md")
    return p.parse_args()


def main():
    args = settings()
    out, messages, artifacts = Path(args.out), read_prompt(PROMPT), {f: load(f, "be", "stage 2") for f in args.be}
    queries = "prompts/desk.queries.txt" if args.held_out else "prompts/desk.test.txt"
    rows = [json.loads(line) for line in beside(queries).read_text(encoding="utf-8").splitlines()]
    if args.held_out:
        held = [be.get("trained_on", [])[:be["metrics"].get("n", 0)] for be in artifacts.values()]
        asked = [{chat[-1]["content"] for chat in chats} for chats in held]
        if not asked or not asked[0] or any(other != asked[0] for other in asked):
            fail("--held-out: expected --be with artifacts of stage 2 that hold out the same queries: of one --seed")
        rows = [row for row in rows if row["query"] in asked[0]]
    rows = rows[:args.n]
    out.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_frozen(args.model)
    for path in artifacts:
        if load(path, "be", "stage 2", model)["messages"] != messages:
            fail(f"{path}: expected a vector of {PROMPT}, found one of another prompt; train it anew")

    # what is fed in each condition, without [BE] itself; a key says all that decides an answer but for rounding
    turns = [[{"role": "user", "content": row["query"]}] for row in rows]
    s = prompt_ids(tokenizer, messages)
    slots = {path: [-1 - i for i in range(len(be["vector"]))] for path, be in artifacts.items()}
    slots |= {"no prompt": [], "prompt cut to a tenth": s[:len(s) // 10]}
    fed = {"full prompt": [chat_ids(tokenizer, messages + t) for t in turns]}
    for name, slot in slots.items():
        fed[name] = [chat_ids(tokenizer, [{"role": "system", "content": slot}] + t) for t in turns]
    fed["default system prompt"] = [chat_ids(tokenizer, t) for t in turns]
    if args.compressed:
        compressed = read_prompt(args.compressed)
        fed["compressed prompt"] = [chat_ids(tokenizer, compressed + t) for t in turns]
    if not {"full prompt"} <= {*(args.only or fed)} <= {*fed}:
        fail(f"--only: expected the full prompt, and others of {[*fed]}; found {args.only}")
    fed = {name: ids for name, ids in fed.items() if not args.only or name in args.only}
    unused = torch.zeros(1, model.config.hidden_size)
    vectors = {name: artifacts[name]["vector"] if name in artifacts else unused for name in fed}
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = {row["key"]: row for row in map(json.loads, lines)}
    of_model, keys = model.fingerprint, {}
    for name in fed:
        decided = [of_model, args.limit, vectors[name].tolist()]
        keys[name] = [hashlib.sha256(repr([*decided, ids]).encode()).hexdigest()[:32] for ids in fed[name]]

    # some questions in all conditions, then the next
    steps = [(at, name) for at in range(0, len(rows), args.batch) for name in fed]
    for at, name in tqdm(steps, desc="rules"):
        part = [i for i in range(len(rows))[at:at + args.batch] if keys[name][i] not in done]
        if not part:
            continue
        answers, _ = answer(model, [fed[name][i] for i in part], vectors[name].to(model.device), args.limit)
        for i, ids in zip(part, answers):
            row = {"key": keys[name][i], "condition": name, "query": rows[i]["query"],
                   "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(), "new_tokens": len(ids),
                   "cut": ids[-1] not in model.generation_config.eos_token_id, "context_tokens": len(fed[name][i])}
            done[row["key"]] = row
            lines.append(json.dumps(row, ensure_ascii=False))
        Path(f"{out}.tmp").write_text("\n".join(lines) + "\n", encoding="utf-8")    # renamed: a kill leaves no half row
        os.replace(f"{out}.tmp", out)

    # name of the condition -> a dict of verdicts a question; the two kinds are two tables
    said = {name: [verdicts(done[key]["answer"], row) for key, row in zip(keys[name], rows)] for name in fed}
    kinds, text = {}, [f"{len(rows)} questions of {'stage 2, held out' if args.held_out else queries}, greedy, at "
                       f"most {args.limit} tokens. Rate and 95% interval; below it the paired difference from the "
                       f"full prompt and its interval, in points."]
    for at, kind in enumerate(("style", "facts")):
        each = {name: [v[at] for v in said[name]] for name in fed}
        names = [name for name in (STYLE, FACTS)[at] if any(name in v for v in each["full prompt"])]
        table = {}
        for rule in names:
            of = {name: [v[rule] for v in each[name] if rule in v] for name in fed}
            full, n = of["full prompt"], len(of["full prompt"])
            table[rule] = {name: {"n": n, "kept": sum(v), "rate": sum(v) / n, "rate_95": wilson(sum(v), n),
                                  "minus_full": (sum(v) - sum(full)) / n, "minus_full_95": paired(v, full)}
                           for name, v in of.items()}
        totals = {name: retention(each[name], each["full prompt"]) for name in fed}
        kinds[kind] = {"rules": table, "all": totals}

        head = f"| rule | n | {' | '.join(fed)} |"
        text += ["", f"## {kind.capitalize()}", "", head, "|---" * (len(fed) + 2) + "|"]
        for rule, of in table.items():
            cells = ["{:.0%} ({:.0%} to {:.0%})".format(t["rate"], *t["rate_95"]) +
                     ("" if name == "full prompt" else "<br>{:+.0f} ({:+.0f} to {:+.0f})".format(
                         *(100 * x for x in [t["minus_full"], *t["minus_full_95"]]))) for name, t in of.items()]
            text.append(f"| {rule} | {of['full prompt']['n']} | {' | '.join(cells)} |")
        cells = ["{:.0%}<br>{:.0%} ({:.0%} to {:.0%})".format(t["mean"], t["retention"], *t["retention_95"])
                 for t in totals.values()]
        text.append(f"| mean over rules; of the full prompt's | {len(rows)} | {' | '.join(cells)} |")
    print("\n".join(text))
    tokens = {name: {key: sum(done[k][key] for k in keys[name]) / len(rows) for key in ("new_tokens", "cut")}
              for name in fed}
    out.with_suffix(".json").write_text(json.dumps(kinds | {"tokens": tokens, "config": vars(args)}, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"wrote {out.with_suffix('.json')} and .md; every answer is in {out}")


if __name__ == "__main__":
    main()
