"""Runs that eval_kl.py measured, as a Markdown table; of seeds, and of prompts, the mean, too.

    python results/table.py out/ablations                       # every NAME.kl.json in the folder
    python results/table.py out/be.kl.json out/roles            # files and folders

Gap closed is 1 - KL([BE]) / KL(no prompt), with its 95% interval over the test queries. KL is in nats a token, from the
full prompt's answers; top-1 is how often [BE] and the full prompt have the same likeliest token; n counts the queries.
NAME.s0, NAME.s1 ... are seeds of one run. From three seeds on, their mean has an interval over seeds (Student's t):
that says what another seed would give on the same queries, not what other queries would. From three prompts on, the
mean over them has an interval over prompts, each counted once, by the mean of its seeds.
"""
import json, re, sys
from pathlib import Path
from statistics import mean, stdev

# the 97.5% quantile of Student's t by degrees of freedom; past the last one, the last one is wide enough
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BESIDE = "no prompt", "default system prompt", "random vector"


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def read_runs(paths):
    """Files, and folders of files -> {name: {"n", "k", "prompt_tokens", "settings", "controls", ...}}."""
    files, runs = [], {}
    for path in map(Path, paths):
        files += sorted(path.glob("*.kl.json")) if path.is_dir() else [path]
    if not files:
        fail(f"expected NAME.kl.json files or folders of them, found none in {paths}; python eval_kl.py writes them")
    for file in files:
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            fed = {name: row["tokens"] for name, row in run["controls"].items()}
            run["k"] = round(fed["[BE]"] - fed["no prompt"])
            run["prompt_tokens"] = round(fed["full prompt"] - fed["no prompt"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            fail(f"{file}: expected what eval_kl.py writes, found {type(e).__name__}: {e}; run it anew")
        runs[file.name.removesuffix(".kl.json")] = run
    return runs


def interval(low, high):
    return f"({low:.3f} to {high:.3f})"


def line(name, run):
    controls = run["controls"]
    be = controls["[BE]"]
    gap = f"{be['gap_closed']:.3f} " + (interval(*be["gap_closed_95"]) if be["gap_closed_95"] else "")
    kl = [f"{controls[key]['kl']:.3f}" for key in ("[BE]", *BESIDE)]
    return [name, run["prompt_tokens"], run["k"], gap, *kl, f"{be['top1']:.1%}", run["n"]]


def mean_line(name, groups):
    """Of seeds, groups of one run each, or of prompts, groups of seeds. Each group counts once."""
    gaps, n = [mean(run["controls"]["[BE]"]["gap_closed"] for run in runs) for runs in groups], len(groups)
    gap = f"{mean(gaps):.3f} "
    if n > 2:
        half = STUDENT[min(n - 1, 9)] * stdev(gaps) / n ** 0.5
        gap += interval(mean(gaps) - half, mean(gaps) + half)
    runs = sum(groups, [])
    kl = [f"{mean(run['controls'][key]['kl'] for run in runs):.3f}" for key in ("[BE]", *BESIDE)]
    top1 = mean(run["controls"]["[BE]"]["top1"] for run in runs)
    tokens, n = (round(mean(run[key] for run in runs)) for key in ("prompt_tokens", "n"))
    return [name, tokens, runs[0]["k"], gap, *kl, f"{top1:.1%}", n]


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv[1:]}:
        sys.exit(print(__doc__))
    found = read_runs(sys.argv[1:])
    rows = ["run", "prompt tokens", "k", "gap closed (95%)", "KL [BE]", *BESIDE, "top-1", "n"],
    seeds, prompts = {}, {}
    for name, run in found.items():
        seeds.setdefault(re.sub(r"\.s\d+$", "", name), {})[name] = run
    for name, runs in seeds.items():
        rows += *(line(*item) for item in runs.items()),
        runs = [*runs.values()]
        rows += (mean_line(f"**{name}**, {len(runs)} seeds", [[run] for run in runs]),) if len(runs) > 1 else ()
        prompts.setdefault(runs[0]["k"], []).append(runs)
    for groups in prompts.values():
        if len(groups) > 2 and len({str(runs[0]["queries"]) for runs in groups}) == len(groups):
            rows += mean_line(f"**mean of {len(groups)} prompts**", groups),
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |" + ("\n|" + "---|" * len(row) if i == 0 else ""))
