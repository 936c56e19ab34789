"""The runs of results/ablations.sh as tables and plots, and what they say of the paper's claims.

    python results/table.py                                                 # out/ablations -> results/README.md, results/ablations.jsonl, results/ablations-*.png
    python results/table.py --runs out/smoke --out out/smoke/README.md      # any part of the runs; a row says of how many it is

A run is a file PROMPT.ROW.sSEED.pt with stage 2's table of controls in it. What the table needs of it is kept as a line of ablations.jsonl, beside the table, and stays there when the run's own files are gone: so
the grid can be filled over days and machines, and the table made again from a checkout alone. Gap closed is 1 - KL([BE]) / KL(no prompt), KL at tau 1, over all answer tokens of the test queries. Two rows are compared on what both
have: the same prompts, seeds, test queries and teacher answers. Their difference is a share of KL(no prompt) of the second row, mean over prompts; in its interval (100,000 draws) the queries are bootstrapped
within each prompt, and the seeds, of which two or three are too few for that, add Student's t of their standard error; the prompts are what they are. Of one seed it knows nothing of seeds: the standard deviation
between seeds, pooled over all rows that have several, stands beside the tables.
"""
import argparse
import io
import json
import math
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch

CLAIMS = [                                                                               # the paper's, then what a user might pick instead; each as "the first row is better than the second"
    ("KD adds to reconstruction with [AE]", "full", "recon"),
    ("KD adds to reconstruction without [AE], the memory token", "memory-kd", "memory"),
    ("reconstruction with [AE] adds to KD", "full", "kd"),
    ("with [AE] it adds more than without", "full", "memory-kd"),
    ("reconstruction without [AE] harms KD", "kd", "memory-kd"),
    ("reconstruction with [AE] adds to KD, with a stage 1 of ten times STEPS", "long", "kd"),
    ("with [AE] it adds more than without, with a stage 1 of ten times STEPS", "long", "memory-long"),
    ("reconstruction without [AE] harms KD, with a stage 1 of ten times STEPS", "kd", "memory-long"),
    ("KD beats prompt tuning on gold answers", "kd", "tuning-gold"),
    ("KD beats prompt tuning on the teacher's answers", "kd", "tuning-teacher"),
    ("self-generated answers beat gold ones", "kd", "kd-gold"),
    ("most of the weight on KD, lambda 0.9, beats 0.1", "full", "lam-10"),
    ("... and 0.5", "full", "lam-50"),
    ("one vector beats the prompt cut to a half", "full", "cut-2"),
    ("one vector beats the prompt cut to a quarter", "full", "cut-4"),
    ("one vector beats a summary of half the length", "full", "summary-2"),
    ("one vector beats a summary of a quarter of the length", "full", "summary-4"),
    ("one vector beats LLMLingua at half the length", "full", "llmlingua-2"),
    ("one vector beats LLMLingua at a quarter of the length", "full", "llmlingua-4"),
]


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"table.py: {message}", file=sys.stderr)
    sys.exit(2)


def load(path):
    """An artifact of the stages -> dict."""
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        fail(f"{path}: expected a run of results/ablations.sh, found none or a damaged file ({type(e).__name__}); remove it and start results/ablations.sh again")


def read_runs(folder):
    """-> [{"prompt", "row", "seed", "model", "tokens", "k", "steps", "controls", "history"}], one for each finished run of the folder."""
    runs = []
    for path in sorted(Path(folder).glob("*.pt")):
        if (m := re.fullmatch(r"(.+)\.([\w-]+)\.s(\d+)", path.stem)):
            a = load(path)
            if "controls" in a.get("metrics", {}):                                       # not yet in a run that goes on
                steps, start = a["config"]["steps"] if a["config"]["lr"] else 0, Path((a["config"].get("be") or [""])[0]).name
                first = load(Path(folder, start))["config"]["steps"] if start.endswith(".recon.pt") else 0      # stage 1's artifact stands beside it
                runs.append({"prompt": m[1], "row": m[2], "seed": int(m[3]), "model": Path(a["config"]["model"]).name, "tokens": a["prompt"]["tokens"], "k": len(a["vector"]),
                             "steps": f"{first} + {steps}", "controls": shorter(a["metrics"]["controls"]), "history": [h for h in a["history"] if "held-out KL" in h]})
    return runs


def shorter(controls):
    """The table of controls with the KL of each query only where a comparison needs it."""
    return {name: {key: x for key, x in row.items() if key != "kl_by_query" or name.startswith(("[BE]", "no prompt"))} for name, row in controls.items()}


def keep(runs, chosen, path):
    """The runs and those that the file `path` keeps of earlier ones -> (all of them in one order, their settings). Of a run that stands in both the new one counts."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()] if Path(path).exists() else []
        merged = {(r["prompt"], r["row"], r["seed"]): r for r in rows}
        other = {r["settings"] for r in rows} - {chosen} if runs or chosen else set()
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f"{path}: expected a run of results/ablations.sh in each line ({type(e).__name__}: {e}); restore it, or give another --out")
    if other:
        fail(f"{path}: its runs have {other.pop() or 'no settings'}, the new ones {chosen or 'no settings.txt'}; rows of two settings make no table, give another --out")
    chosen = chosen or (rows[0]["settings"] if rows else "")
    merged |= {(r["prompt"], r["row"], r["seed"]): r | {"settings": chosen} for r in runs}
    return [merged[key] for key in sorted(merged)], chosen


def control(run, name="[BE]"):
    """A row of a run's table of controls; its name may go on, as in "[BE], 4 vectors"."""
    return next(row for key, row in run["controls"].items() if key.startswith(name))


def interval(pairs, draws=100_000):
    """Mean over prompts of sum(top) / sum(bottom) with its 95% interval: queries bootstrapped, seeds by Student's t. pairs: for each prompt (top, bottom), arrays (S, Q) over seeds and queries -> (mean, low, high)."""
    rng, means = np.random.default_rng(0), np.zeros((2, draws))
    for top, bottom in pairs:
        queries = rng.integers(top.shape[1], size=(draws, top.shape[1]))
        means += top.sum(0)[queries].sum(1) / bottom.sum(0)[queries].sum(1) / len(pairs)
        if len(top) > 1:                        # three seeds drawn out of three are one and the same in 1 of 9 draws: that would give little more than their range
            by_seed = top.sum(1) / bottom.sum(1)
            t = rng.standard_t(len(top) - 1, size=draws)
            means += by_seed.std(ddof=1) / len(top) ** 0.5 * np.stack([t, -t]) / len(pairs)          # both signs: b - a is a - b mirrored
    return sum(top.sum() / bottom.sum() for top, bottom in pairs) / len(pairs), *np.quantile(means, [0.025, 0.975])


def show(x):
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*x[:3]) if x else ""


def by_query(runs, name="[BE]"):
    """(S, Q): the KL of each query, summed over its answer."""
    return np.array([control(r, name)["kl_by_query"] for r in runs])


def same_teacher(a, b):
    """Whether two runs were measured against the same teacher answers: as many tokens, and the same KL of a row that has nothing of [BE] or of the layout in it."""
    (x, p), (y, q) = ((control(r)["answer_tokens"], control(r, "default system prompt")["kl"]) for r in (a, b))
    return x == y and math.isclose(p, q, rel_tol=0.02)


def difference(runs, row, other, prompt=None):
    """How much more of the gap `row` closes than `other`, on the prompts and seeds that both have (of one prompt alone, if named) -> (mean, low, high, the fewest seeds of a prompt), or None if
    they share none."""
    pairs = []
    for p in dict.fromkeys(r["prompt"] for r in runs if prompt in (None, r["prompt"])):
        a, b = ({r["seed"]: r for r in runs if r["row"] == name and r["prompt"] == p} for name in (row, other))
        for x, y in ((a, b), (b, a)):           # a text in the prompt's place is not trained and has no seed: each seed of the other row meets the same one
            if len(x) == 1 and (only := next(iter(x.values())))["steps"] == "0 + 0":
                x |= dict.fromkeys(y, only)
        if seeds := [s for s in a if s in b and same_teacher(a[s], b[s])]:
            a, b = [a[s] for s in seeds], [b[s] for s in seeds]
            pairs.append((by_query(b) - by_query(a), by_query(b, "no prompt")))
    return (*interval(pairs), min(len(top) for top, _ in pairs)) if pairs else None


def seed_deviation(runs):
    """The standard deviation of gap closed between the seeds of one prompt and row, pooled -> (deviation, how many rows have several seeds), or None."""
    groups = {}
    for r in runs:
        groups.setdefault((r["prompt"], r["row"]), []).append(control(r)["gap_closed"])
    several = [x for x in groups.values() if len(x) > 1]
    return (math.sqrt(sum(np.var(x, ddof=1) * (len(x) - 1) for x in several) / sum(len(x) - 1 for x in several)), len(several)) if several else None


def verdict(x, single=()):
    """What the interval of a difference says of a claim that it is positive. single: the same of each prompt alone; where one of them contradicts another or the mean, the mean says nothing."""
    if not x:
        return "cannot tell: not run"
    every = (x, *single)
    if any(low > 0 for _, low, *_ in every) and any(high < 0 for _, _, high, *_ in every):
        return "cannot tell: the prompts disagree"
    return ("holds here" if x[1] > 0 else "does not hold here" if x[2] < 0 else "cannot tell: the interval holds 0") + ", on a single seed" * (x[3] == 1)


def report(runs, chosen=""):
    """The runs as Markdown. chosen: the settings that results/ablations.sh wrote down beside them."""
    prompts, seeds = [*dict.fromkeys(r["prompt"] for r in runs)], sorted({r["seed"] for r in runs})
    deviation = seed_deviation(runs)
    rows = sorted({r["row"] for r in runs}, key=lambda row: (row != "full", row))
    rebuilt = dict.fromkeys(re.sub(r"^(cut|summary|llmlingua)-\d+$", r"\1", row) for row in rows)
    lines = ["# Ablations", "", f"Of `ROWS=\"{' '.join(rebuilt)}\" SEEDS=\"{' '.join(map(str, seeds))}\" {chosen}results/ablations.sh` the runs that are finished, by "
             "`python results/table.py`; the rows of a prompt and their seeds stand below, what each row is at the head of",
             "results/ablations.sh. Steps: of stage 1 + of stage 2. KL in nats a token and top-1 are over the answers to the test queries. Gap closed, KL and top-1: means over the seeds; 95% intervals: over queries",
             "and seeds; where the last column has a 1, over queries alone. Against full: gap closed minus that of the full method, paired, as a share of full's own KL(no prompt) (the block layout has another).",
             *([f"Between the seeds of a row, gap closed has a standard deviation of {deviation[0]:.3f}, pooled over {deviation[1]} rows: a difference of single seeds below {2 * 2 ** 0.5 * deviation[0]:.2f} may be the seed's."]
               if deviation else [])]
    for p in prompts:
        of = [r for r in runs if r["prompt"] == p]
        run = min(of, key=lambda r: (r["row"] != "full", r["row"], r["seed"]))
        lines += ["", f"## {p}, {run['tokens']} tokens", "", "| row | steps | k | gap closed (95%) | against full (95%) | KL | top-1 | n queries | seeds |", "|" + "---|" * 9]
        for row in rows:
            if part := [r for r in of if r["row"] == row]:
                mean, low, high = interval([(by_query(part, "no prompt") - by_query(part), by_query(part, "no prompt"))])
                kl, top1 = (np.mean([control(r)[key] for r in part]) for key in ("kl", "top1"))
                lines.append(f"| {row} | {part[0]['steps']} | {part[0]['k']} | {mean:.3f} ({low:.3f} to {high:.3f}) | {show(difference(runs, row, 'full', p)) if row != 'full' else ''} | {kl:.3f} | {top1:.1%} | "
                             f"{control(part[0])['n']} | {len(part)} |")
        lines.append("| *controls* | | | " + "; ".join(f"{name} {row['gap_closed']:.3f}" for name, row in run["controls"].items() if not name.startswith("[BE]")) + " | | | | | |")
    if shared := {row: x for row in rows if row != "full" and (x := difference(runs, row, "full"))}:
        lines += ["", "## Over the prompts", "", "| row | against full, mean over the prompts that both have (95%) | prompts | seeds, of the prompt with the fewest |", "|---|---|---|---|"]
        lines += [f"| {row} | {show(x)} | {', '.join(p for p in prompts if difference(runs, row, 'full', p))} | {x[3]} |" for row, x in shared.items()]
    lines += ["", "## The paper's claims", "", f"Here: {', '.join(sorted({r['model'] for r in runs}))}, these prompts, this budget, and KL to the teacher as the measure, which is also what KD minimises: "
              "where the paper compares scores of tasks, this is a stand-in. "
              "*Holds*: the whole interval of the paired difference is on the claim's side, and no prompt's own interval is on the other. The "
              "intervals are over queries and seeds, not over prompts: of another prompt they say nothing; and they are 95% each, not for all claims at once.", "",
              "| claim | difference | mean over prompts (95%) | by prompt (95%) | verdict |", "|---|---|---|---|---|"]
    for text, a, b in CLAIMS:
        x, single = difference(runs, a, b), {p: d for p in prompts if (d := difference(runs, a, b, p))}
        lines.append(f"| {text} | {a} - {b} | {show(x)} | {', '.join(f'{p} {show(d)}' for p, d in single.items())} | {verdict(x, single.values())} |")
    kept = {p: np.mean([control(r)["gap_closed"] for r in runs if r["row"] == "full" and r["prompt"] == p]) for p in prompts if any(r["row"] == "full" and r["prompt"] == p for r in runs)}
    if kept:
        lines.append(f"| one vector keeps about 98% of the behaviour | full | gap closed {np.mean([*kept.values()]):.3f} | {', '.join(f'{p} {x:.3f}' for p, x in kept.items())} | "
                     f"{'holds here' if min(kept.values()) >= 0.98 else 'not in KL; task accuracy, which the paper reports, is another measure'} |")
    return "\n".join(lines) + "\n"


def plots(runs, folder):
    """Gap closed by k, by lambda and by the prompt's length, and the loss curves of the full method; a plot needs two points -> the names of those drawn."""
    from matplotlib.figure import Figure
    full = [r for r in runs if r["row"] == "full"]
    lengths = [r for r in runs if r["row"] in ("full", "length")]
    by_k, by_lambda = ([r for r in runs if r["row"] == "full" or re.fullmatch(rf"{name}-\d+", r["row"])] for name in ("k", "lam"))
    drawn = {
        "k": ("vectors k", [(r["prompt"], r["k"], control(r)["gap_closed"]) for r in by_k]),
        "lambda": ("lambda", [(r["prompt"], 0.9 if r["row"] == "full" else int(r["row"][4:]) / 100, control(r)["gap_closed"]) for r in by_lambda]),
        "length": ("tokens of the prompt", [("full method", r["tokens"], control(r)["gap_closed"]) for r in lengths]),
        "curves": ("step", [(r["prompt"], h["step"], h["held-out KL"]) for r in full for h in r["history"]]),
    }
    names = []
    for name, (label, points) in drawn.items():
        if len({x for _, x, _ in points}) < 2:
            continue
        figure, picture = Figure(figsize=(7, 4)), io.BytesIO()
        axes = figure.subplots()
        for line in dict.fromkeys(p for p, _, _ in points):
            xs = sorted({x for p, x, _ in points if p == line})
            axes.plot(xs, [np.mean([y for p, x, y in points if p == line and x == at]) for at in xs], marker="o", label=line)
        axes.set(xlabel=label, ylabel="held-out KL, nats a token" if name == "curves" else "gap closed, mean over seeds")
        axes.legend()
        figure.savefig(picture, dpi=100, bbox_inches="tight", format="png")
        write(Path(folder, f"ablations-{name}.png"), picture.getvalue())
        names.append(f"ablations-{name}.png")
    return names


def write(path, data):
    """Whole or not at all."""
    try:
        Path(f"{path}.tmp").write_bytes(data)
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        fail(f"{path}: cannot be written ({e.strerror}); give another --out")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="out/ablations", help="the folder of results/ablations.sh")
    p.add_argument("--out", default="results/README.md", help="the table; its plots are written beside it")
    args = p.parse_args()
    now, kept = Path(args.runs, "settings.txt"), Path(args.out).parent / "ablations.jsonl"
    found, chosen = keep(read_runs(args.runs), now.read_text(encoding="utf-8").strip() if now.is_file() else "", kept)
    if not found:
        fail(f"--runs {args.runs}: expected finished runs, PROMPT.ROW.sSEED.pt; make some with: results/ablations.sh")
    text = report(found, f"{chosen} " if chosen else "")
    write(kept, "".join(json.dumps(r) + "\n" for r in found).encode())
    text += "".join(f"\n![{name}]({name})\n" for name in plots(found, Path(args.out).parent))
    write(args.out, text.encode())
    print(text)
