#!/usr/bin/env bash
# Rebuilds the small BLIP-2 that ships with the package, from nothing: about 155 minutes on two CPU
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
[ -f "$work/language1/text_accuracy.json" ] ||
    stage language "$text" "$work/language1" --steps "$(steps 3900)"
[ -f "$work/language2/text_accuracy.json" ] || stage language "$text" "$work/language2" \
    --term 2 --start "$work/language1/last" --steps "$(steps 3550)"
[ -f "$work/vision/vision_accuracy.json" ] || stage vision "$work/vision" --steps "$(steps 1600)"
start=()
for phase in "match 3000" "phrases 2000" "captions 1200"; do
    read -r name number <<<"$phase"
    [ -f "$work/$name/last/pretraining.safetensors" ] || stage qformer "$name" \
        --vision "$work/vision/last" --language "$work/language2/last" --tokenizers "$text" \
        "${start[@]}" --out "$work/$name" --steps "$(steps "$number")"
    start=(--start "$work/$name/last")
done
stage assemble --tokenizers "$text" --vision "$work/vision" \
    --language "$work/language1" "$work/language2" --qformer "$work/captions" --out "$out"
