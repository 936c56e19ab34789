"""The same roles on two models: the gap that [BE] closes, and whose words its answers have, as bars.

    python results/sizes.py results/rolellm.json results/rolellm-1.5b.json          # -> results/sizes.png

Each file is what eval_rolellm.py wrote; the name of its model is in it.
"""
import json, sys
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {"gap_closed": "gap closed", "be_teacher": "ROUGE-L against\nthe full prompt's answers",
          "retention": "ROUGE-L against references,\nas a share of the full prompt's"}
COLOURS = ["#b5bcc4", "#1f6fb4"]


def beside(role, key, other):
    """The figure that [BE] has in a panel, for what else may stand in the prompt's place: other is none or default."""
    if key == "gap_closed":
        return 1 - role[f"{other}_kl"] / role["none_kl"]
    return role[f"{other}_teacher"] if key == "be_teacher" else role[other] / role["full"]


files = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
names = [role["role"] for role in files[-1]["roles"]]
figure = Figure(figsize=(9, 3.6), layout="constrained")
for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), PANELS.items()):
    for i, (file, colour) in enumerate(zip(files, COLOURS)):
        roles = {role["role"]: role for role in file["roles"]}
        values, mean = [roles[name][key] for name in names], file["mean"][key]
        rows = [y + 0.4 * i for y in range(len(names) + 1)]
        axes.barh(rows, [*values, mean["mean"]], height=0.38, color=colour, label=Path(file["config"]["model"]).name)
        axes.plot(mean["interval_95"], [rows[-1]] * 2, color="black", lw=1)     # 95% over roles, of the mean alone
        for other, mark, label in ("none", "k|", "no prompt"), ("default", "kx", "default system prompt"):
            others = [beside(roles[name], key, other) for name in names]
            axes.plot(others, rows[:-1], mark, ms=5, label=None if i else label)
    axes.set(title=title, yticks=[y + 0.2 for y in range(len(names) + 1)], yticklabels=[*names, "mean"])
    axes.title.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)
axes.invert_yaxis()
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
path = Path(__file__).with_name("sizes.png")
figure.savefig(path, dpi=150)
print(f"wrote {path}")
