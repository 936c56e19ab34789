#!/usr/bin/env bash
# GSM8K with a model that can solve it: the eight-shot dialogue, 1,726 tokens, into one vector; then accuracy with the dialogue, with the vector and with neither -> results/gsm8k.jsonl, results/gsm8k.json.
#
#     results/gsm8k.sh models/qwen2.5-coder-1.5b        # made by: python models/prepare.py --gguf qwen2.5-coder-1.5b-instruct-q4_k_m.gguf --out models/qwen2.5-coder-1.5b
#
# Distillation alone, from noise: 136 training questions, 24 held out (the vector is chosen on them), 128 tokens of each answer. Two cores: 20 minutes for the teacher's answers, 40 for 260 steps, an hour for
# 250 questions under three conditions. Needs data/gsm8k/prepare.py. A run that was killed goes on: start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:?usage: results/gsm8k.sh MODEL, a folder or hub name of a model that solves GSM8K}
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-out/gsm8k}
mkdir -p "$OUT"
head -n 160 data/gsm8k/queries.jsonl > "$OUT/queries.jsonl"                                      # training questions, in the wording of the evaluation
sed -n 501,508p data/gsm8k/queries.jsonl > "$OUT/test.jsonl"                                     # eight more of them, for the table of controls at the end of stage 2
"$PYTHON" stage2_kd.py --model "$MODEL" --prompt prompts/gsm8k_8shot.json --queries "$OUT/queries.jsonl" --test-queries "$OUT/test.jsonl" --answer-tokens 128 \
    --init random --lam 1 --tau 1 --batch 2 --lr 0.02 --steps 260 --eval-every 65 --out "$OUT/kd.pt" $([ -e "$OUT/kd.pt" ] && echo --resume)
"$PYTHON" eval_gsm8k.py --be "$OUT/kd.pt" --n 250 --batch 32 --out results/gsm8k.jsonl
