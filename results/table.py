"""The runs of results/ablations.sh as tables and plots.

    python results/table.py                                                 # out/ablations -> results/README.md, results/ablations-*.png
    python results/table.py --runs out/smoke --out out/smoke/README.md      # any part of the runs; a row says of how many it is

A run is a file PROMPT.ROW.sSEED.pt with stage 2's table of controls in it. For each row: gap closed on the test queries (1 - KL([BE]) / KL(no prompt), KL at tau 1 in nats a token), its mean for each prompt over the
seeds with their range, and the mean over all runs with a bootstrap interval over them (10,000 draws, prompts and seeds alike; none for a single run). The controls of the full method's runs stand below.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

CONTROLS = ["full prompt", "no prompt", "no system block", "default system prompt", "random vector", "prompt cut to"]


def read_runs(folder):
    """-> [{"prompt", "row", "seed", "controls", "answers"}], one for each finished run of the folder."""
    runs = []
    for path in sorted(Path(folder).glob("*.pt")):
        if (m := re.fullmatch(r"(.+)\.([\w-]+)\.s(\d+)", path.stem)) and not path.stem.startswith("teacher-"):
            a = torch.load(path, weights_only=True)
            if "controls" in a.get("metrics", {}):                                       # not yet in a run that goes on
                runs.append({"prompt": m[1], "row": m[2], "seed": int(m[3]), "tokens": a["prompt"]["tokens"], "k": len(a["vector"]),
                             "controls": a["metrics"]["controls"], "history": a["history"]})
    return runs


def gap(run, name="[BE]"):
    """Gap closed of a row of a run's table of controls; its name may go on, as in "[BE], 4 vectors"."""
    return next(v["gap_closed"] for key, v in run["controls"].items() if key.startswith(name))


def interval(values):
    """Mean and its 95% bootstrap interval over runs, as text."""
    values = np.array(values)
    if len(values) == 1:
        return f"{values[0]:.3f}"
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return f"{values.mean():.3f} ({np.quantile(means, 0.025):.3f} to {np.quantile(means, 0.975):.3f})"


def spread(values):
    """Mean over the seeds of one prompt, and their range."""
    return "" if not values else f"{values[0]:.3f}" if len(values) == 1 else f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(runs):
    """The runs as Markdown."""
    prompts = list(dict.fromkeys(r["prompt"] for r in runs))
    sizes = [f"{p}, {next(r['tokens'] for r in runs if r['prompt'] == p)} tokens" for p in prompts]
    lines = ["# Ablations", "", "Made by `results/ablations.sh` and `python results/table.py`; what each row is stands at the head of results/ablations.sh. Gap closed on test queries; mean over seeds (their range) for",
             "each prompt, mean over all runs (95% bootstrap interval over runs).", "", f"| row | {' | '.join(sizes)} | all | runs |", "|" + "---|" * (len(prompts) + 3)]
    for row in dict.fromkeys(r["row"] for r in runs):
        part = [r for r in runs if r["row"] == row]
        cells = [spread([gap(r) for r in part if r["prompt"] == p]) for p in prompts]
        lines.append(f"| {row} | {' | '.join(cells)} | {interval([gap(r) for r in part])} | {len(part)} |")
    lines += ["", "## The controls", "", "From the runs of one row and seed for each prompt; the same test queries and teacher answers as above.", "",
              "| prompt | n queries | " + " | ".join(CONTROLS) + " |", "|" + "---|" * (len(CONTROLS) + 2)]
    for p in prompts:
        run = min((r for r in runs if r["prompt"] == p), key=lambda r: (r["row"] != "full", r["row"], r["seed"]))
        lines.append(f"| {p} | {next(iter(run['controls'].values()))['n']} | " + " | ".join(f"{gap(run, name):.3f}" for name in CONTROLS) + " |")
    return "\n".join(lines) + "\n"


def plots(runs, folder):
    """Gap closed by k, by lambda and by the prompt's length, and the loss curves of the full method; a plot needs two points -> the names of those drawn."""
    from matplotlib.figure import Figure
    full = [r for r in runs if r["row"] == "full"]
    lengths = [r for r in runs if r["row"] in ("full", "length")]
    by_k, by_lambda = ([r for r in runs if r["row"] == "full" or re.fullmatch(rf"{name}-\d+", r["row"])] for name in ("k", "lam"))
    drawn = {
        "k": ("vectors k", [(r["prompt"], r["k"], gap(r)) for r in by_k]),
        "lambda": ("lambda", [(r["prompt"], 0.9 if r["row"] == "full" else int(r["row"][4:]) / 100, gap(r)) for r in by_lambda]),
        "length": ("tokens of the prompt", [("full method", r["tokens"], gap(r)) for r in lengths]),
        "curves": ("step", [(r["prompt"], h["step"], h["held-out KL"]) for r in full for h in r["history"] if "held-out KL" in h]),
    }
    names = []
    for name, (label, points) in drawn.items():
        if len({x for _, x, _ in points}) < 2:
            continue
        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        for line in dict.fromkeys(p for p, _, _ in points):
            xs = sorted({x for p, x, _ in points if p == line})
            axes.plot(xs, [np.mean([y for p, x, y in points if p == line and x == at]) for at in xs], marker="o", label=line)
        axes.set(xlabel=label, ylabel="held-out KL, nats a token" if name == "curves" else "gap closed, mean over seeds")
        axes.legend()
        figure.savefig(Path(folder, f"ablations-{name}.png"), dpi=100, bbox_inches="tight")
        names.append(f"ablations-{name}.png")
    return names


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="out/ablations", help="the folder of results/ablations.sh")
    p.add_argument("--out", default="results/README.md", help="the table; its plots are written beside it")
    args = p.parse_args()
    found = read_runs(args.runs)
    if not found:
        print(f"table.py: --runs {args.runs}: expected finished runs, PROMPT.ROW.sSEED.pt; make some with: results/ablations.sh", file=sys.stderr)
        sys.exit(2)
    text = report(found)
    text += "".join(f"\n![{name}]({name})\n" for name in plots(found, Path(args.out).parent))
    Path(args.out).write_text(text, encoding="utf-8")
    print(text)
