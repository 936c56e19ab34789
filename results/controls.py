"""Gap closed by [BE], and by what else could stand in the prompt's place, as bars with 95% intervals.

    python results/controls.py out/be.kl.json                       # -> results/controls.png
    python results/controls.py out/roles/Coriolanus.k1.s0.kl.json out/be.kl.json        # a group of bars a file
"""
import re, sys
from pathlib import Path

from matplotlib.figure import Figure
from table import read_runs

CONTROLS = "[BE]", "default system prompt", "prompt cut to k tokens", "random vector"


def draw(runs, path):
    """runs: {name: what eval_kl.py wrote}, each a group of bars."""
    step = len(CONTROLS) + 1.6                              # from group to group, in bars; its heading stands between
    figure = Figure(figsize=(8, 0.3 * step * len(runs) + 0.7), layout="constrained")
    axes, ticks = figure.subplots(), {}
    for i, run in enumerate(runs.values()):
        prompt = re.sub(r"(\.test|\.queries)?\.\w+$", "", Path(run["settings"]["queries"]).name)
        heading = f"{prompt.replace('_', ' ')}: {run['prompt_tokens']} tokens, n = {run['n']} test queries"
        axes.text(0.01, i * step - 0.85, heading, weight="bold", va="center")
        k, s = run["k"], "s" if run["k"] > 1 else ""
        for j, name in enumerate(CONTROLS):
            row, y = run["controls"][name], i * step + j
            gap = row["gap_closed"]
            low, high = row["gap_closed_95"] or (gap, gap)
            axes.barh(y, gap, height=0.75, color="#1f6fb4" if name == "[BE]" else "#b5bcc4")
            axes.errorbar(gap, y, xerr=[[max(0, gap - low)], [max(0, high - gap)]], color="black", lw=1, capsize=2)
            axes.text(max(high, 0) + 0.015, y, f"{gap:.2f}", va="center", size=9)
            ticks[y] = name.replace("[BE]", f"[BE], {k} vector{s}").replace("k tokens", f"{k} token{s}")
    axes.set_yticks([*ticks], ticks.values())
    axes.set_ylim(len(runs) * step - 2, -1.5)                                       # the first group is on top
    axes.set_xlim(right=1.03)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for x, name in (0, "no prompt"), (1, "full prompt"):
        axes.axvline(x, color="black", lw=0.8, ls="-" if x == 0 else "--")
        axes.text(x, 1.0, name, ha="center", va="bottom", size=9, transform=axes.get_xaxis_transform())
    axes.set_xlabel("gap closed: 1 - KL / KL(no prompt), 95% interval over queries")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    draw(read_runs(sys.argv[1:]), Path(__file__).with_name("controls.png"))
