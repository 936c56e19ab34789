#!/usr/bin/env bash
# GSM8K with a model that can solve it: the eight-shot dialogue, 1,726 tokens, into one vector; then accuracy with the dialogue, with the vectors and with neither -> results/gsm8k.jsonl, results/gsm8k-256.json, results/gsm8k-512.json.
#
#     results/gsm8k.sh models/qwen2.5-coder-1.5b        # made by: python models/prepare.py --gguf qwen2.5-coder-1.5b-instruct-q4_k_m.gguf --out models/qwen2.5-coder-1.5b
#
# Two vectors, over the same teacher answers: of the whole method (a short stage 0, a short stage 1, stage 2), and of distillation alone, from noise. 136 training questions, 24 held out (a vector is chosen on
# them), 128 tokens of each answer. Two cores: 20 minutes for the teacher's answers, 40 for the 260 steps of distillation alone, 90 for the whole method, an hour and a half for 250 questions under four conditions.
# Needs data/gsm8k/prepare.py and data/ae_corpus/prepare.py. A run that was killed goes on: start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:-}
[ -n "$MODEL" ] || { echo "usage: results/gsm8k.sh MODEL, a folder or hub name of a model that solves GSM8K" >&2; exit 2; }
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-out/gsm8k}
PROMPT=prompts/gsm8k_8shot.json
mkdir -p "$OUT"
head -n 160 data/gsm8k/queries.jsonl > "$OUT/queries.jsonl"                                      # training questions, in the wording of the evaluation
sed -n 501,508p data/gsm8k/queries.jsonl > "$OUT/test.jsonl"                                     # eight more of them, for the table of controls at the end of stage 2
run() {      # run SCRIPT NAME [options]: writes $OUT/NAME.pt, or goes on with it
    "$PYTHON" "$1" --model "$MODEL" --out "$OUT/$2.pt" "${@:3}" $([ -e "$OUT/$2.pt" ] && echo --resume)
}
distil() {   # distil NAME [options]: stage 2, alike for both but for its start and L_recon
    run stage2_kd.py "$1" --prompt "$PROMPT" --queries "$OUT/queries.jsonl" --test-queries "$OUT/test.jsonl" --answer-tokens 128 --tau 1 --batch 2 --lr 0.02 --steps 260 --eval-every 65 "${@:2}"
}
run stage0_ae.py ae --steps 60 --batch 2 --accumulate 1 --max-tokens 128 --held-out 4 --eval-every 20 --lr 0.015
run stage1_recon.py recon --prompt "$PROMPT" --ae "$OUT/ae.pt" --steps 24 --lr 0.01 --save-every 8
distil whole --be "$OUT/recon.pt" --ae "$OUT/ae.pt" --recon-every 8
distil kd --init random --lam 1
for limit in 512 256; do     # a limit makes anew only the answers that it changes
    "$PYTHON" eval_gsm8k.py --be "$OUT/kd.pt" "$OUT/whole.pt" --n 250 --batch 32 --max-new-tokens "$limit" --out "$OUT/gsm8k.jsonl"
    cp "$OUT/gsm8k.json" "results/gsm8k-$limit.json"
done
cp "$OUT/gsm8k.jsonl" results/gsm8k.jsonl
