"""The losses of an artifact's training, as a .png beside it.

    python results/curves.py out/be.pt              # any artifact of stages 0, 1 and 2 -> out/be.png
"""
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

for path in map(Path, sys.argv[1:]):
    history = torch.load(path, weights_only=True)["history"]
    axes = Figure().subplots()
    for name in dict.fromkeys(key for row in history for key in row if key != "step"):
        axes.plot(*zip(*[(row["step"], row[name]) for row in history if name in row]), ".-", label=name, lw=1, ms=3)
    axes.set(xlabel="step", ylabel="nats a token", yscale="log")            # losses fall by factors
    axes.legend()
    axes.figure.savefig(path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")
