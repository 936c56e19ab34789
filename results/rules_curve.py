"""Rules kept against steps of training, for each number of vectors: results/rules-curve*.json -> results/rules.png"""
import json, re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
found = [json.loads(path.read_text()) for path in sorted(HERE.glob("rules-curve*.json"))]
figure = Figure(figsize=(8, 3.4), layout="constrained")
for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), {"style": "style rules", "facts": "facts"}.items()):
    kept, lines = {name: row["mean"] for part in found for name, row in part[kind]["all"].items()}, {}
    for name, rate in kept.items():
        if match := re.search(r"rules(\d*)/k(\d+)\.s\d+\.(\d+)\.pt", name):              # of 200 steps, or as many
            lines.setdefault((int(match[2]), match[1]), {0: kept["no prompt"]})[int(match[3])] = rate
    for (k, steps), line in sorted(lines.items()):
        label = f"{k} vector{'s' if k > 1 else ''}" + (f", {steps} steps" if steps else "")
        axes.plot(*zip(*sorted(line.items())), ".-", label=label)
    for name, style in ("full prompt", "--"), ("no prompt", ":"):
        axes.axhline(kept[name], color="black", lw=0.8, ls=style)
        axes.text(1, kept[name] + 0.01, name, size=8, ha="right", transform=axes.get_yaxis_transform())
    axes.set(title=f"{title} kept", xlabel="steps of stage 2, four queries each", ylim=(0, 1.08))
    axes.spines[["top", "right"]].set_visible(False)
axes.legend(fontsize=8, loc="center right")
figure.savefig(HERE / "rules.png", dpi=150)
print(f"wrote {HERE / 'rules.png'}")
