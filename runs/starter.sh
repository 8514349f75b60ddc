#!/usr/bin/env bash
# Rebuilds the small BLIP-2 that ships with the package, from nothing: about three hours on two CPU
# cores. Every stage is a run of the package's training loop: it writes checkpoints and resumes; a
# stage that is done is skipped.
#   [SCALE=1] runs/starter.sh [WORK_FOLDER] [OUT]   (default: runs/out/starter, and OUT below it)
# SCALE multiplies the steps of every stage: 0.01 tries the whole way in minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/out/starter}
out=${2:-$work/model}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src:runs/starter
steps() { "$python" -c "print(max(2, round($1 * ${SCALE:-1})))"; }
stage() { echo "== $*"; "$python" -u "runs/starter/$1.py" "${@:2}"; }

text=$work/tokenizers
[ -f "$text/tokenizer.json" ] || stage build_tokenizers "$text"

# The language model learns from text alone, so it trains beside the image encoder and the first phase
# of the Q-Former, each with half of the cores.
threads=$(($(nproc) > 1 ? $(nproc) / 2 : 1))
language_stages() {
    export OMP_NUM_THREADS=$threads
    [ -f "$work/language1/text_accuracy.json" ] ||
        stage language "$text" "$work/language1" --steps "$(steps 3900)"
    [ -f "$work/language2/text_accuracy.json" ] || stage language "$text" "$work/language2" \
        --term 2 --start "$work/language1/last" --steps "$(steps 3550)"
}
qformer() { # PHASE STEPS [option ...]
    [ -f "$work/$1/last/pretraining.safetensors" ] || stage qformer "$1" --vision "$work/vision/last" \
        --tokenizers "$text" --out "$work/$1" --steps "$(steps "$2")" "${@:3}"
}
mkdir -p "$work"
language_stages > "$work/language.log" 2>&1 &
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
export OMP_NUM_THREADS=$threads
[ -f "$work/vision/vision_accuracy.json" ] || stage vision "$work/vision" --steps "$(steps 800)"
qformer match 3000
echo "== language: $work/language.log"
wait $!
unset OMP_NUM_THREADS
qformer phrases 2000 --language "$work/language2/last" --start "$work/match/last"
qformer captions 1200 --language "$work/language2/last" --start "$work/phrases/last"
stage assemble --tokenizers "$text" --vision "$work/vision" \
    --language "$work/language1" "$work/language2" --qformer "$work/captions" --out "$out"
