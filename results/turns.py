"""Does [BE] hold for a whole chat? Stage 2 trained on one turn and on three, at the same number of optimizer steps, both measured on turns 1, 2 and 3.

    python results/turns.py                          # -> results/turns.jsonl, a row a run, and results/turns.md; runs that are in the file are not run again
    python results/turns.py --steps 4 --out out/turns.md                    # a quick look

Later turns are follow-up questions after the teacher's own answers. The control is the empty slot, whose KL says how much of the prompt a turn still needs.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(command, log):
    """Run a command line from the repository's folder -> what it printed, which the log has too."""
    print("$", command, flush=True)
    with open(log, "a") as f:
        done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=HERE.parent, stdout=subprocess.PIPE, stderr=f, text=True)
        f.write(done.stdout)
    if done.returncode:
        sys.exit(f"turns.py: that command failed; its output is in {log}")
    return done.stdout


def tables(printed):
    """The tables that stage 2 prints, one a turn -> list of {name of the row: {"kl", "gap_closed", "gap_closed_95", "n"}}."""
    found = []
    for line in printed.splitlines():
        if title := re.match(r"(\d+) (test|held-out) queries, ", line):
            n = int(title[1])
            found.append({})
        elif row := re.match(r"(\S.*?)  +([\d.]+) +[\d.]+% +(\S+) +(?:(\S+) to (\S+)|-) +\d+$", line):
            kl, gap, low, high = (x and float(x) for x in row.groups()[1:])                # one query has no interval
            found[-1][row[1].split(",")[0]] = {"kl": kl, "gap_closed": gap, "gap_closed_95": [low, high], "n": n}
    return found


def report(rows):
    """The rows as a table, a line for each turn that was tested."""
    lines = ["| trained on | steps | tested on | gap closed (95%) | n | KL [BE] | KL empty slot |", "|" + "---|" * 7]
    for r in rows:
        for turn, table in enumerate(r["turns"], 1):
            be, none = table["[BE]"], table["no prompt (empty slot)"]
            gap = f"{be['gap_closed']:.3f}" + (" ({:.3f} to {:.3f})".format(*be["gap_closed_95"]) if be["n"] > 1 else "")
            lines.append(f"| {r['trained_on']} turn{'s' * (r['trained_on'] > 1)} | {r['steps']} | turn {turn} | {gap} | {be['n']} | {be['kl']:.3f} | {none['kl']:.3f} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", default="prompts/pirate.txt")
    p.add_argument("--turns", type=int, nargs="*", default=[1, 3], help="how many turns each run trains on")
    p.add_argument("--tested", type=int, default=3, help="how many turns all are measured on")
    p.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stage2", default="--answer-tokens 32 --lam 1", help="options for stage2_kd.py")
    p.add_argument("--start", default="--init random", help="options for training alone")
    p.add_argument("--out", default=str(HERE / "turns.md"), help="the table; the rows stand beside it, in a .jsonl")
    args = p.parse_args()
    out = Path(args.out)
    path = out.with_suffix(".jsonl")
    folder = HERE.parent / "out/turns"                                        # one folder, so that all runs share the teacher's answers
    folder.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)

    def done():
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    wanted = []
    for turns in args.turns:
        name = f"out/turns/{Path(args.prompt).stem}.t{turns}.s{args.seed}"
        common = f"python stage2_kd.py --prompt {args.prompt} --seed {args.seed} {args.stage2}"
        commands = [f"{common} {args.start} --turns {turns} --steps {args.steps} --out {name}.pt", f"{common} --turns {args.tested} --steps 0 --out {name}.pt"]
        wanted.append(commands)
        if any(r["commands"] == commands for r in done()):
            continue
        train, test = [run(c, HERE.parent / f"{name}.log") for c in commands]
        row = {"trained_on": turns, "steps": args.steps, "seed": args.seed, "turns": tables(test), "commands": commands}
        if len(row["turns"]) != args.tested:
            sys.exit(f"turns.py: expected {args.tested} tables, found {len(row['turns'])}; what stage 2 printed is in {name}.log")
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
    table = report([r for r in done() if r["commands"] in wanted])            # the file may hold runs of other prompts, seeds or steps
    Path(f"{out}.tmp").write_text(table)
    os.replace(f"{out}.tmp", out)
    print(table)


if __name__ == "__main__":
    main()
