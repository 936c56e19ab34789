"""The same roles on two models: the gap that [BE] closes, and whose words its answers have, as bars.

    python results/sizes.py results/rolellm.json results/rolellm-1.5b.json          # -> results/sizes.png

Each file is what eval_rolellm.py wrote; the name of its model is in it.
"""
import json, sys
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {"gap_closed": "gap closed", "be_teacher": "ROUGE-L against\nthe full prompt's answers",
          "retention": "ROUGE-L against references:\n[BE] / full prompt"}
COLOURS = ["#b5bcc4", "#1f6fb4"]

files = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
names = [role["role"] for role in files[-1]["roles"]]
figure = Figure(figsize=(9, 3.6), layout="constrained")
for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), PANELS.items()):
    for i, (file, colour) in enumerate(zip(files, COLOURS)):
        values = {role["role"]: role[key] for role in file["roles"]} | {"mean": file["mean"][key]["mean"]}
        label = Path(file["config"]["model"]).name
        rows = [y + 0.4 * i for y in range(len(names) + 1)]
        axes.barh(rows, [values[name] for name in [*names, "mean"]], height=0.38, color=colour, label=label)
        low, high = file["mean"][key]["interval_95"]
        axes.plot([low, high], [rows[-1]] * 2, color="black", lw=1)             # 95% over roles, of the mean alone
        if key == "be_teacher":                             # what the model says without a prompt, as a mark
            none = {role["role"]: role["none_teacher"] for role in file["roles"]}
            axes.plot([none[name] for name in names], rows[:-1], "k|", label=None if i else "no prompt")
    axes.set(title=title, yticks=[y + 0.2 for y in range(len(names) + 1)], yticklabels=[*names, "mean"])
    axes.title.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)
axes.invert_yaxis()
figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
path = Path(__file__).with_name("sizes.png")
figure.savefig(path, dpi=150)
print(f"wrote {path}")
