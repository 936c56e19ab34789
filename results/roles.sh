#!/usr/bin/env bash
# How much of a role prompt's behaviour k vectors keep: stages 1 and 2, eval_kl.py on test questions -> a table.
#
#     python data/rolellm/prepare.py --from rolebench                 # once: data/rolellm/NAME.txt and its questions
#     results/roles.sh > out/roles.md                                 # three roles, one vector each
#     K=4 SEEDS="0 1 2" results/roles.sh Coriolanus                   # four vectors, three seeds
#
# The table is of all that OUT holds. Finished runs are skipped and a killed one goes on: start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out/roles} K=${K:-1} SEEDS=${SEEDS:-0}
[ $# != 0 ] || set -- Jack_Sparrow Coriolanus Walt_Kowalski

run() {     # run SCRIPT NAME [options]: NAME.pt is there when it is finished, and until then NAME.part
    [ ! -e "$2.pt" ] || return 0
    (set -x; "$PYTHON" "$1" --prompt "$prompt" --seed "$seed" --out "$2.part" "${@:3}" --resume) >&2
    mv "$2.part" "$2.pt"
}
for seed in $SEEDS; do for role in "$@"; do
    prompt=data/rolellm/$role.txt && name=$OUT/$role.k$K.s$seed
    [ ! -e "$name.kl.json" ] || continue
    run stage1_recon.py "$name.recon" --k "$K"
    run stage2_kd.py "$name" --init "$name.recon.pt" --tau 1 --steps 300 --answer-tokens 32
    (set -x; "$PYTHON" eval_kl.py --be "$name.pt" --queries "data/rolellm/$role.test.txt" >&2)
done; done
"$PYTHON" results/table.py "$OUT"
