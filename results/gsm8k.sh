#!/usr/bin/env bash
# GSM8K with a model that can solve it: the eight-shot dialogue, 1,726 tokens, becomes one vector; accuracy with the
# dialogue, with the vectors and with neither -> out/gsm8k/gsm8k-256.json, gsm8k-512.json and gsm8k.jsonl, the answers.
#
#     python data/gsm8k/prepare.py && python data/ae_corpus/prepare.py --offline
#     python models/prepare.py --gguf qwen2.5-coder-1.5b-instruct-q4_k_m.gguf --out models/qwen2.5-coder-1.5b
#     results/gsm8k.sh models/qwen2.5-coder-1.5b
#
# Two vectors over the same teacher answers: of the whole method, with a short stage 0 and a short stage 1, and of
# distillation alone, from noise. 136 training questions and 24 held out, which choose the vector; 128 tokens of each
# answer. Finished runs are skipped and a killed one goes on: start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:-} PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out/gsm8k} PROMPT=prompts/gsm8k_8shot.json
[ -n "$MODEL" ] || { echo "usage: results/gsm8k.sh MODEL, the folder of one that solves GSM8K" >&2; exit 2; }
mkdir -p "$OUT"
head -n 160 data/gsm8k/queries.jsonl > "$OUT/queries.jsonl"         # training questions, as the evaluation words them

run() {     # run SCRIPT NAME [options]: OUT/NAME.pt is there when it is finished, and until then OUT/NAME.part
    [ ! -e "$OUT/$2.pt" ] || return 0
    (set -x; "$PYTHON" "$1" --model "$MODEL" --out "$OUT/$2.part" "${@:3}" --resume)
    mv "$OUT/$2.part" "$OUT/$2.pt"
}
distil() {  # distil NAME [options]: stage 2, alike for both but for the start and L_recon
    run stage2_kd.py "$1" --prompt "$PROMPT" --queries "$OUT/queries.jsonl" --answer-tokens 128 --tau 1 --batch 2 \
        --lr 0.02 --steps 260 --eval-every 65 "${@:2}"
}
run stage0_ae.py ae --steps 60 --batch 2 --max-tokens 128 --held-out 4 --eval-every 20 --lr 0.015
run stage1_recon.py recon --prompt "$PROMPT" --ae "$OUT/ae.pt" --steps 24 --lr 0.01
distil whole --init "$OUT/recon.pt" --recon-every 8
distil kd --init noise --lam 1
for limit in 512 256; do    # a limit makes anew only the answers that it changes
    "$PYTHON" eval_gsm8k.py --be "$OUT/kd.pt" "$OUT/whole.pt" --n 250 --max-new-tokens "$limit" --out "$OUT/gsm8k.jsonl"
    cp "$OUT/gsm8k.json" "$OUT/gsm8k-$limit.json"
done
