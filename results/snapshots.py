"""stage2_kd.py, and every save stays: out/be.pt leaves out/be.50.pt, out/be.100.pt: the vector after so many steps.

    python results/snapshots.py --prompt prompts/desk.txt --eval-every 50 --out out/be.pt       # stage 2's own options

The vector in each is the one being trained, not the best so far: for curves of what is learned when.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stage2_kd

save = stage2_kd.save


def save_both(path, **artifact):
    save(path, **artifact)
    if "run" in artifact:
        step, vector = artifact["run"]["step"], artifact["run"]["be"]
        save(Path(path).with_suffix(f".{step}.pt"), **artifact | {"vector": vector})


stage2_kd.save = save_both
stage2_kd.main()
