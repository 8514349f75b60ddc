#!/usr/bin/env bash
# Whether it helps that the Q-Former reads the instruction, on the dense world: trains the BLIP-2 of
# that world (about 20 minutes on two CPU cores), tunes it with and without the instruction in the
# Q-Former, and writes docs/dense.md. Every stage resumes; one that is done is skipped.
#   runs/dense.sh [WORK_FOLDER] [--seeds 5] [--queries 2 4 8 16] ...   (default: runs/out/dense)
# SCALE multiplies the steps of the pre-training, DOCS names another folder for the page.
set -euo pipefail
cd "$(dirname "$0")/.."
work=runs/out/dense
if [[ $# -gt 0 && $1 != -* ]]; then work=$1; shift; fi
python=${PYTHON:-.venv/bin/python}
steps() { "$python" -c "print(max(2, round($1 * ${SCALE:-1})))"; }
stage() { echo "== $*"; PYTHONPATH=src:runs/starter "$python" -u "runs/dense/$1.py" "${@:2}"; }

mkdir -p "$work"
[ -f "$work/vision/vision_accuracy.json" ] || stage encoder "$work/vision" --steps "$(steps 500)"
[ -f "$work/hidden_words/accuracy.json" ] ||
    stage hidden_words "$work/hidden_words" --vision "$work/vision" --steps "$(steps 2500)"
[ -f "$work/completions/losses.json" ] || stage completions "$work/completions" \
    --vision "$work/vision" --start "$work/hidden_words" --steps "$(steps 800)"
[ -f "$work/model/config.json" ] ||
    stage assemble "$work/model" --vision "$work/vision" \
        --words "$work/hidden_words" --qformer "$work/completions"
export PYTHONPATH=src:.
"$python" -u -m runs.dense.claim "$work/claim" --start "$work/model" "$@"
"$python" -u -m runs.dense.attention "$work/claim"
"$python" -m runs.dense.write "$work/claim" "${DOCS:-docs}"
