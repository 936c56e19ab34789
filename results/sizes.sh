#!/usr/bin/env bash
# The six roles on a larger model, one vector each, distilled from noise -> out/sizes/rolellm.{json,md,answers.jsonl}.
#
#     python data/rolellm/prepare.py                                  # once: RoleBench, the prompts and the questions
#     results/sizes.sh models/qwen2.5-coder-1.5b                      # two hours of one CPU core
#     python results/sizes.py results/rolellm.json out/sizes/rolellm.json             # the figure
#
# Finished roles are skipped: start it again after a kill.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out/sizes} MODEL=${1:?a folder or hub name}
mkdir -p "$OUT/roles"
for role in Jack_Sparrow Walt_Kowalski Coriolanus Tom_Ripley Andrew_Detmer Professor_G.H._Dorr; do
    [ -e "$OUT/roles/$role.pt" ] && continue
    head -n 120 "data/rolellm/$role.queries.txt" > "$OUT/$role.queries.txt"         # 18 of these are held out
    "$PYTHON" stage2_kd.py --model "$MODEL" --prompt "data/rolellm/$role.txt" --queries "$OUT/$role.queries.txt" \
        --init noise --lam 1 --tau 1 --lr 0.4 --steps 80 --eval-every 40 --out "$OUT/$role.pt"
    mv "$OUT/$role.pt" "$OUT/roles/$role.pt"
done
"$PYTHON" eval_rolellm.py --model "$MODEL" --artifacts "$OUT/roles" --num-questions 25 --max-new-tokens 128 \
    --out "$OUT/rolellm"
