#!/usr/bin/env bash
# Rebuilds the small BLIP-2 that ships with the package, from nothing: about three hours on two CPU
# cores. Each stage writes checkpoints and is resumed; a stage that is done is skipped.
#   runs/starter.sh [WORK_FOLDER]      (default: runs/out/starter)
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/out/starter}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src:runs/starter
stage() { echo "== $*"; "$python" -u "runs/starter/$1.py" "${@:2}"; }

[ -f "$work/language/tokenizer.json" ] || stage build_tokenizers "$work/language"
for term in 1 2; do
    [ -f "$work/language/term$term/text_accuracy.json" ] ||
        stage train_language "$work/language" --term $term --minutes 36
done
[ -f "$work/vision/vision_accuracy.json" ] || stage train_vision "$work/vision" --minutes 20
start=()
for step in "match 35" "regions 16" "captions 12"; do
    read -r name minutes <<<"$step"
    [ -f "$work/$name/qformer.pt" ] || stage train_blip2 "$name" --vision "$work/vision" \
        --language "$work/language" "${start[@]}" --out "$work/$name" --minutes "$minutes"
    start=(--start "$work/$name")
done
stage assemble --vision "$work/vision" --language "$work/language" --qformer "$work/captions" \
    --out src/instructblip/starter
