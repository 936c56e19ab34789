"""How much of a role prompt's behaviour one vector keeps: stages 1 and 2 by their own command lines, for three RoleBench roles, k = 1 and 4.

    python data/rolellm/prepare.py --from rolebench
    python results/roles.py                          # -> results/roles.jsonl, a row a run, and results/roles.md; runs that are in the file are not run again
    python results/roles.py --k 4 --roles Coriolanus --seed 1
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
OTHERS = ["no system block at all", "default system prompt"]                              # what else stands where there is no prompt: the gap closed against each


def timed(command, log):
    """Run a command line from the repository's folder -> (wall seconds, peak resident memory in GB)."""
    print("$", command, flush=True)
    started = time.perf_counter()
    with open(log, "a") as f:
        child = subprocess.Popen([sys.executable, *shlex.split(command)[1:]], cwd=HERE.parent, stdout=f, stderr=f)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"roles.py: that command failed; its output is in {log}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def commands_of(role, k, args):
    """-> (where the files of a run begin, its two command lines)."""
    out = f"out/roles/{role}.k{k}.s{args.seed}"
    return out, [f"python stage1_recon.py --prompt data/rolellm/{role}.txt --out {out}.recon.pt --k {k} --seed {args.seed} {args.stage1}".strip(),
                 f"python stage2_kd.py --prompt data/rolellm/{role}.txt --be {out}.recon.pt --out {out}.be.pt --seed {args.seed} --k {k} {args.stage2}".strip()]


def report(rows):
    """The rows as a table, with means over roles."""
    lines = ["| role | k | [BE] gap closed (95%) | against no system block | against the default one | held-out gap closed | KL full / [BE] / none / random | top-1 | n | stages 1 + 2, s | peak GB |", "|" + "---|" * 11]
    means = {}
    for r in rows:
        c = {name.split(",")[0].split(" (")[0].rstrip("s"): row for name, row in r["controls"].items()}
        be, others = c["[BE]"], " | ".join(f"{1 - c['[BE]']['kl'] / c[name]['kl']:.3f}" for name in OTHERS)
        kl = " / ".join(f"{c[name]['kl']:.3f}" for name in ("full prompt", "[BE]", "no prompt", "random vector"))
        lines.append(f"| {r['role']} | {r['k']} | {be['gap_closed']:.3f} ({be['gap_closed_95'][0]:.3f} to {be['gap_closed_95'][1]:.3f}) | {others} | {r['held_out_gap_closed']:.3f} | {kl} | "
                     f"{be['top1']:.1%} | {be['n']} | {r['seconds'][0]:.0f} + {r['seconds'][1]:.0f} | {max(r['peak_gb']):.2f} |")
        means.setdefault(r["k"], []).append([be["gap_closed"], *(1 - be["kl"] / c[name]["kl"] for name in OTHERS)])
    for k, gaps in sorted(means.items()):
        lines.append(f"| **mean of {len(gaps)}** | {k} | " + " | ".join(f"**{sum(x) / len(x):.3f}**" for x in zip(*gaps)) + " |" * 7)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--roles", nargs="*", default=["Jack_Sparrow", "Coriolanus", "Walt_Kowalski"])
    p.add_argument("--k", type=int, nargs="*", default=[1, 4])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stage1", default="", help="options for stage1_recon.py")
    p.add_argument("--stage2", default="--answer-tokens 32 --tau 1 --steps 300", help="options for stage2_kd.py")
    args = p.parse_args()
    path = HERE / "roles.jsonl"
    def done():
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    for role, k in [(r, k) for k in args.k for r in args.roles]:
        out, commands = commands_of(role, k, args)
        if any(r["commands"] == commands for r in done()):
            print(f"{role}, k = {k}: in {path.name} already")
            continue
        Path(HERE.parent, out).parent.mkdir(parents=True, exist_ok=True)
        seconds, peak = zip(*[timed(c, HERE.parent / f"{out}.log") for c in commands])
        be = torch.load(HERE.parent / f"{out}.be.pt", weights_only=True)
        row = {"role": role, "k": k, "seed": args.seed, "controls": be["metrics"]["controls"], "held_out_gap_closed": be["metrics"]["held_out_gap_closed"], "seconds": seconds,
               "peak_gb": peak, "threads": torch.get_num_threads(), "commands": commands}
        with open(path, "a") as f:                                            # a row is one write, so two roles can run at once
            f.write(json.dumps(row) + "\n")
    table = report([r for r in done() if r["commands"] == commands_of(r["role"], r["k"], args)[1]])          # of one seed and one set of options: a mean over roles, not over runs
    (HERE / "roles.md.tmp").write_text(table)
    os.replace(HERE / "roles.md.tmp", HERE / "roles.md")
    print(table)
