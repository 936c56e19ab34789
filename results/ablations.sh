#!/usr/bin/env bash
# A small grid of ablations by the scripts' own command lines, at an equal number of optimizer steps -> a table.
#
#     results/ablations.sh > out/ablations.md                         # two prompts, three seeds
#     STEPS=4 SEEDS=0 OUT=out/smoke results/ablations.sh              # does it run at all?
#
#     row         stage 1, a quarter of the steps     stage 2
#     full        [BE] [AE] -> the prompt             lambda 0.9
#     kd          none: [BE] begins as noise          lambda 1, all steps
#     recon       as full, all steps                  none
#     memory-kd   without [AE]: a memory token        lambda 0.9
#     lam-50      as full                             lambda 0.5
#     k-4         as full, four vectors               lambda 0.9
# Beside PROMPT.txt it wants PROMPT.queries.txt and PROMPT.test.txt. Finished runs are skipped and a killed one goes on:
# start it again. Another MODEL, AE or STEPS wants another OUT. results/ablations.jsonl is of an earlier, larger grid.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} MODEL=${MODEL:-models/smollm2-135m} AE=${AE:-artifacts/ae-smollm2-135m.pt}
PROMPTS=${PROMPTS:-prompts/pirate.txt prompts/support.txt} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-100}
ROWS=${ROWS:-full kd recon memory-kd lam-50 k-4} OUT=${OUT:-out/ablations}
FIRST=$((STEPS < 4 ? 1 : STEPS / 4)) chosen="MODEL=$MODEL AE=$AE STEPS=$STEPS"
mkdir -p "$OUT"
[ -e "$OUT/settings.txt" ] || echo "$chosen" > "$OUT/settings.txt"
grep -Fxq "$chosen" "$OUT/settings.txt" || { echo "$OUT has runs of $(cat "$OUT/settings.txt"); set OUT" >&2; exit 2; }
run() {     # run SCRIPT NAME [options]: NAME.pt is there when it is finished, and until then NAME.part
    [ ! -e "$2.pt" ] || return 0
    (set -x; "$PYTHON" "$1" --prompt "$prompt" --model "$MODEL" --seed "$seed" --out "$2.part" "${@:3}" --resume) >&2
    mv "$2.part" "$2.pt"
}
both() {    # both START "options of stage 1" [options of stage 2]: rows of one START share its stage 1
    run stage1_recon.py "$at.$1.s$seed.recon" --ae "$AE" --steps "$FIRST" $2
    run stage2_kd.py "$name" --init "$at.$1.s$seed.recon.pt" --steps $((STEPS - FIRST)) "${@:3}"
}
for seed in $SEEDS; do for prompt in $PROMPTS; do for row in $ROWS; do
    at=$OUT/$(basename "${prompt%.*}") && name=$at.$row.s$seed
    [ ! -e "$name.kl.json" ] || continue
    case $row in
        full)       both base "" ;;
        kd)         run stage2_kd.py "$name" --init noise --lam 1 --steps "$STEPS" ;;
        recon)      run stage1_recon.py "$name" --ae "$AE" --steps "$STEPS" ;;
        memory-kd)  both memory "--ae none" ;;
        lam-50)     both base "" --lam 0.5 ;;
        k-4)        both k-4 "--k 4" ;;
    esac
    (set -x; "$PYTHON" eval_kl.py --be "$name.pt" >&2)
done; done; done
echo -e "$chosen\n" && "$PYTHON" results/table.py "$OUT"
