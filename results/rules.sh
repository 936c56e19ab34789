#!/usr/bin/env bash
# Rules kept: k vectors for prompts/desk.txt, from noise, and which rules their answers keep -> results/rules.md, .png
#
#     results/rules.sh models/qwen2.5-coder-1.5b                  # hours on two cores
#     KS="1" SEEDS="0" STEPS=50 results/rules.sh MODEL            # a part of it
#
# Finished runs are skipped, a killed one goes on: start it again. Several at once take different KS, then one all.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:?a folder or hub name} PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out/rules}
KS=${KS:-1 2 4 8 16} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-200} LR=${LR:-0.5}

vectors=() curve=()
for k in $KS; do for seed in $SEEDS; do
    [ "$k" = 1 ] || [ "$seed" = 0 ] || continue                 # three seeds of one vector, one of the others
    name=$OUT/k$k.s$seed
    [ -e "$name.$STEPS.pt" ] || (set -x; "$PYTHON" results/snapshots.py --prompt prompts/desk.txt --model "$MODEL" \
        --init noise --lam 1 --tau 1 --lr "$LR" --answer-tokens 64 --steps "$STEPS" --eval-every 50 \
        --k "$k" --seed "$seed" --out "$name.pt" --resume)
    vectors+=("$name.pt")
    [ "$seed" != 0 ] || curve+=("$OUT"/k"$k".s0.*.pt)
done; done
[ -z "${TRAIN_ONLY:-}" ] || exit 0
"$PYTHON" results/rules.py --model "$MODEL" --be "${vectors[@]}" --compressed results/desk.llmlingua.txt
"$PYTHON" results/rules.py --model "$MODEL" --be "${curve[@]}" --held-out --limit 64 --out results/rules-curve.jsonl \
    --only "full prompt" "no prompt" "${curve[@]}"
"$PYTHON" results/rules_curve.py
