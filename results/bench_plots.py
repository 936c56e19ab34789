"""results/bench.json as figures: gap closed against seconds, and time to the first token -> two .png beside it."""
import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
items = json.loads((HERE / "bench.json").read_text())

# time to quality, and the share that was aimed at
runs = [row for row in items["quality"] if "seed" in row]
prompts = sorted({row["prompt"] for row in runs})
figure = Figure(figsize=(8, 3.2), layout="constrained")
for axes, prompt in zip(figure.subplots(1, len(prompts), sharey=True, squeeze=False)[0], prompts):
    for row in (row for row in runs if row["prompt"] == prompt):
        for name, color in ("ours", "tab:blue"), ("naive", "tab:gray"):                         # a line a seed
            seconds, _, gaps = zip(*row[name])
            label = name if row["seed"] == runs[0]["seed"] else None
            axes.plot(seconds, gaps, ".-", color=color, lw=1, label=label)
    axes.axhline(row["target"], color="black", lw=0.8, ls="--")
    axes.set(title=Path(prompt).stem.replace("_", " "), xlabel="seconds from the command line", ylim=(0, 0.6))
    axes.spines[["top", "right"]].set_visible(False)
axes.legend(fontsize=8, loc="lower right")
figure.supylabel("held-out gap closed")
figure.savefig(HERE / "bench-time-to-quality.png", dpi=150)

# the first token
rows = [row for row in items["serving"] if row["what"] == "seconds to the first token"]
figure = Figure(figsize=(5, 3.2), layout="constrained")
axes = figure.subplots()
for name, color in ("full prompt", "tab:gray"), ("[BE]", "tab:blue"):
    for batch, style in (1, "o-"), (8, "s--"):
        points = [(row["prompt_tokens"], row[name]["median"]) for row in rows if row["batch"] == batch]
        axes.plot(*zip(*sorted(points)), style, color=color, lw=1, ms=4, label=f"{name}, batch {batch}")
axes.set(xlabel="tokens of the prompt", ylabel="seconds to the first token", yscale="log")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(fontsize=8, loc="center right")
figure.savefig(HERE / "bench-first-token.png", dpi=150)
print("wrote bench-time-to-quality.png and bench-first-token.png in", HERE)
