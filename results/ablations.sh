#!/usr/bin/env bash
# The ablations: each row of the list below, by the stage scripts' own command lines, at an equal number of optimizer steps, over the same cached teacher answers, for three prompts and three seeds.
#
#     results/ablations.sh                                           # all of it -> out/ablations, then results/README.md. Some 180 runs, most of a day on two cores, so choose
#     ROWS="full kd memory-kd" SEEDS="0 1" results/ablations.sh      # some rows, two seeds
#     STEPS=2 SEEDS=0 QUERIES=16 TESTS=4 OUT=out/smoke README=out/smoke/README.md results/ablations.sh        # does it run at all?
#
# A run that is finished is skipped and one that was killed goes on: start it again with the same settings. Another MODEL, AE, STEPS, QUERIES, TESTS, STAGE1 or STAGE2 wants another OUT and README: results/ablations.jsonl keeps
# the finished runs, and table.py adds to them. Needs data/rolellm/prepare.py and data/gsm8k/prepare.py.
#
#     row                        stage 1                 stage 2
#     full                       recon with [AE]         lambda 0.9
#     memory, recon              without / with [AE]     -                         measured only; all steps are stage 1's
#     kd                         -                       lambda 1, from noise
#     memory-kd                  recon without [AE]      lambda 0.9, no [AE] in its L_recon either
#     long, memory-long          as full, memory-kd with ten times STEPS in stage 1: what stage 1 gives where it has the time. No equal budget
#     tuning-gold, -teacher      -                       cross-entropy on gold answers, on the teacher's (prompt tuning), from noise
#     kd-gold                    -                       lambda 1, from noise, along gold answers
#     lam-0, -10, -50, -100      recon with [AE]         lambda 0, 0.1, 0.5, 1 (full is 0.9)
#     k-2, -4, -8                recon with [AE]         lambda 0.9, several vectors (full is 1)
#     block                      recon with [AE]         lambda 0.9, the block layout (full is chat)
#     length                     as full, for the prompts of LENGTHS: with PROMPTS they have about 100, 250, 360, 940, 1,700 and 3,100 tokens
#     cut, summary, llmlingua    results/baselines.py: what a user would pick instead; nothing is learned, so for the first seed only
#
# Equal budget, but for the rows long: STEPS optimizer steps in all, a quarter of them in stage 1 where a row has one. All queries of a prompt come from one .jsonl, so all its runs of one seed read one teacher file.
# prompts/support.txt has no gold answers: tuning-gold and kd-gold leave it out, and with kd have the prompt GOLD in its place.
# prompts/styleguide.txt has no questions: the model is asked for them once, and the last TESTS are kept for test.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-models/smollm2-135m}
AE=${AE:-}                                                    # as --ae of the stages: none named, they find it
OUT=${OUT:-out/ablations}
README=${README:-results/README.md}
STEPS=${STEPS:-100}
SEEDS=${SEEDS:-0 1 2}
PROMPTS=${PROMPTS:-data/rolellm/Jack_Sparrow.txt prompts/support.txt prompts/gsm8k_8shot.json}
LENGTHS=${LENGTHS-$OUT/pirate100.txt prompts/pirate.txt prompts/styleguide.txt}
GOLD=${GOLD-data/rolellm/Walt_Kowalski.txt}                   # one more prompt for kd, kd-gold and tuning-gold
ROWS=${ROWS:-full kd memory recon memory-kd long memory-long tuning-gold tuning-teacher kd-gold k-2 k-4 k-8 lam-0 lam-10 lam-50 lam-100 block length cut summary llmlingua}
QUERIES=${QUERIES:-120}                                       # questions of a prompt, with those held out
TESTS=${TESTS:-32}
STAGE1=${STAGE1:-}                                            # more options for stage1_recon.py and stage2_kd.py, the same for all rows
STAGE2=${STAGE2:---answer-tokens 32 --eval-every 25}
ROLEBENCH=${ROLEBENCH:-data/rolellm/rolebench}
[ -d "$ROLEBENCH" ] || ROLEBENCH=../shared/data/rolebench

fail() { echo "ablations.sh: $1" >&2; exit 2; }
[ $# = 0 ] || fail "expected no arguments, found '$*'; the settings are environment variables, as at the head of this file"
[ -x "$PYTHON" ] || command -v "$PYTHON" > /dev/null || fail "no $PYTHON; make .venv with: make demo, or name another with PYTHON=python3"
case $STEPS in ''|*[!0-9]*|0|1) fail "STEPS: expected a whole number from 2, found '$STEPS'";; esac
for seed in $SEEDS; do case $seed in *[!0-9]*) fail "SEEDS: expected whole numbers, found '$seed'";; esac; done
for row in $ROWS; do
    case $row in full|kd|memory|recon|memory-kd|long|memory-long|tuning-gold|tuning-teacher|kd-gold|k-[0-9]*|lam-[0-9]*|block|length|cut|summary|llmlingua) ;; *) fail "ROWS: there is no row $row; the rows are in the head of this file";; esac
done
mkdir -p "$OUT"
chosen="MODEL=$MODEL${AE:+ AE=$AE} STEPS=$STEPS QUERIES=$QUERIES TESTS=$TESTS STAGE1=\"$STAGE1\" STAGE2=\"$STAGE2\""
if [ -e "$OUT/settings.txt" ] && [ "$(cat "$OUT/settings.txt")" != "$chosen" ]; then fail "OUT: the runs in $OUT have $(cat "$OUT/settings.txt"), now it is $chosen; give the same, or another OUT"; fi
kept=$(dirname "$README")/ablations.jsonl
earlier=$([ ! -e "$kept" ] || "$PYTHON" -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["settings"])' "$kept" 2> /dev/null) || fail "README: $kept has no runs of this script in it; restore it, or give another README"
if [ -e "$kept" ] && [ "$earlier" != "$chosen" ]; then fail "README: the runs in $kept have ${earlier:-no settings}, now it is $chosen; give the same, or another README (and OUT)"; fi
echo "$chosen" > "$OUT/settings.txt"
FIRST=$((STEPS < 4 ? 1 : STEPS / 4))
"$PYTHON" -c 'import re, sys
open(sys.argv[1], "w").write(" ".join(re.split(r"(?<=[.!?])\s+", open("prompts/pirate.txt", encoding="utf-8").read())[:3]) + "\n")' "$OUT/pirate100.txt"          # 97 tokens

# run SCRIPT NAME [options]: writes NAME.pt by way of NAME.part.pt, so that NAME.pt is there when it is finished and not before
run() {
    local script=$1 name=$2; shift 2
    if [ -e "$name.pt" ]; then return; fi
    mkdir -p "$(dirname "$name")"
    local command=("$PYTHON" "$script" --prompt "$prompt" --model "$MODEL" --seed "$seed" --out "$name.part.pt" "$@")
    if [ -e "$name.part.pt" ]; then command+=(--resume); fi
    echo "\$ ${command[*]}"
    "${command[@]}" >> "$name.log" 2>&1 || { code=$?; echo "ablations.sh: that command ended with code $code: $(tail -n 1 "$name.log")" >&2; exit $code; }
    mv "$name.part.pt" "$name.pt"
    rm -f "$name".part.*
}

# stage1 NAME STEPS [options]; stage2 NAME [options]: NAME is of the row, $at and $s of the prompt and the seed. Of an option that stands twice the last one counts
stage1() { local name=$1 steps=$2; shift 2; run stage1_recon.py "$at.$name.$s.recon" --ae "$AE" $STAGE1 --steps "$steps" "$@"; }
stage2() { local name=$1; shift; run stage2_kd.py "$at.$name.$s" --queries "$at.queries.jsonl" --test-queries "$at.test.jsonl" --ae "$AE" $STAGE2 "$@"; }
measure() { stage2 "$1" --be "$at.$1.$s.recon.pt" --steps 1 --lr 0 --lam 1 --batch 1; }       # a step of length 0 moves nothing, and the artifact gets its table of controls (--steps 0 only prints it)
both() {      # both NAME START "stage 1 options" [stage 2 options]: rows of one START share stage 1
    local name=$1 start=$2 first=$3; shift 3
    stage1 "$start" "$FIRST" $first
    stage2 "$name" --be "$at.$start.$s.recon.pt" --steps $((STEPS - FIRST)) "$@"
}

# questions PROMPT: $at.queries.jsonl and $at.test.jsonl, with an "answer" where there are gold ones
questions() {
    local beside=${prompt%.*}
    if [ -e "$at.test.jsonl" ]; then return; fi
    if [ "$stem" = pirate100 ]; then beside=prompts/pirate; fi
    if [ ! -e "$beside.queries.txt" ] && [ "$stem" != gsm8k_8shot ]; then                       # stage 2 asks the model; one answer token of each is enough
        seed=0 run stage2_kd.py "$OUT/self.$stem/asked" --queries self --self-queries $((QUERIES + TESTS)) --init random --lam 1 --steps 1 --lr 0 --answer-tokens 1
        cp "$OUT/self.$stem"/queries-*.txt "$OUT/self.$stem/all.txt"
        beside=$OUT/self.$stem/all
    fi
    "$PYTHON" - "$prompt" "$beside" "$at" "$QUERIES" "$TESTS" "$ROLEBENCH" <<'PYTHON' || exit
import json, os, re, sys
from pathlib import Path
prompt, beside, at, queries, tests, rolebench = sys.argv[1:]
queries, tests, stem = int(queries), int(tests), Path(prompt).stem


def lines(path):
    return [x for x in Path(path).read_text(encoding="utf-8-sig").split("\n") if x.strip()]


try:
    if stem == "gsm8k_8shot":                                 # the gold answers in the words of the eight shots; the wording of the questions out of queries.jsonl
        train, test, asked = ([json.loads(x) for x in lines(f"data/gsm8k/{name}.jsonl")] for name in ("train", "test", "queries"))
        words = asked[0]["query"].replace(train[0]["question"].strip(), "{}")
        assert words.count("{}") == 1, "data/gsm8k/queries.jsonl: its first row does not ask the first question of train.jsonl"
        gold = [" ".join(re.sub(r"\s*####\s*", " The final answer is ", re.sub(r"<<[^>]*>>", "", r["answer"])).split()) for r in train]
        train, test = [{"question": words.format(r["question"].strip()), "answer": a} for r, a in zip(train, gold)], [words.format(r["question"].strip()) for r in test]
    elif "rolellm" in prompt:                                 # RoleBench has an answer to each of its training questions
        file = Path(rolebench, f"instructions-eng/role-specific-{stem.replace('_', ' ')}.jsonl")
        train, test = [{"question": r["instruction"], "answer": r["answer"]} for r in map(json.loads, lines(file))], lines(f"{beside}.test.txt")
    else:
        train = lines(f"{beside}.queries.txt") if Path(f"{beside}.queries.txt").exists() else lines(f"{beside}.txt")
        test = lines(f"{beside}.test.txt") if Path(f"{beside}.test.txt").exists() else train[-tests:]
        train = [{"question": q} for q in train if q not in test]
except (OSError, ValueError, KeyError, AssertionError, IndexError) as e:
    print(f"ablations.sh: {prompt}: its questions cannot be made: {e}; see data/gsm8k/prepare.py, data/rolellm/prepare.py and the head of this file", file=sys.stderr)
    sys.exit(2)
for name, rows in [("queries", train[:queries]), ("test", [{"question": q} for q in test[:tests]])]:       # test last: where it is there, both are whole
    Path(f"{at}.{name}.tmp").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    os.replace(f"{at}.{name}.tmp", f"{at}.{name}.jsonl")
PYTHON
}

for seed in $SEEDS; do
    for row in $ROWS; do
        prompts=$PROMPTS
        case $row in length) prompts=$LENGTHS ;; kd|kd-gold|tuning-gold) prompts="$PROMPTS $GOLD" ;; esac
        for prompt in $prompts; do
            [ -e "$prompt" ] || fail "PROMPTS, LENGTHS, GOLD: $prompt is not there"
            stem=$(basename "${prompt%.*}") s=s$seed
            at=$OUT/$stem
            questions
            case $row in
                full)           both full base "" ;;
                length)         both length base "" ;;
                lam-*)          both "$row" base "" --lam "$("$PYTHON" -c "print(${row#lam-} / 100)")" ;;
                k-*)            both "$row" "$row" "--k ${row#k-}" ;;
                block)          both block block "--layout block" ;;
                memory-kd)      both memory-kd memory-start "--ae none" --ae none ;;
                long)           both long long "--steps $((10 * STEPS))" ;;
                memory-long)    both memory-long memory-long "--ae none --steps $((10 * STEPS))" --ae none ;;
                memory)         stage1 memory "$STEPS" --ae none; measure memory ;;
                recon)          stage1 recon "$STEPS"; measure recon ;;
                kd)             stage2 kd --init random --lam 1 --steps "$STEPS" ;;
                tuning-teacher) stage2 "$row" --init random --lam 1 --steps "$STEPS" --hard ;;
                kd-gold|tuning-gold)
                    hard=; if [ "$row" = tuning-gold ]; then hard=--hard; fi
                    if grep -q '"answer"' "$at.queries.jsonl"; then stage2 "$row" --init random --lam 1 --steps "$STEPS" --answers gold $hard
                    else echo "$row, $prompt: left out, it has no gold answers"; fi ;;
                cut|summary|llmlingua)
                    if [ "$seed" != "${SEEDS%% *}" ]; then continue; fi
                    if [ "$row" = llmlingua ] && ! "$PYTHON" -c "import llmlingua" 2> /dev/null; then echo "llmlingua, $prompt: left out, the package is not there: pip install llmlingua"; continue; fi
                    "$PYTHON" results/baselines.py --prompt "$prompt" --methods "$row" --model "$MODEL" --seed "$seed" --queries "$at.queries.jsonl" --test-queries "$at.test.jsonl" --out "$OUT" --stage2="$STAGE2" ;;
            esac
        done
    done
done
"$PYTHON" results/table.py --runs "$OUT" --out "$README"
