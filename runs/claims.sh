#!/usr/bin/env bash
# The paper's claims on Scenes: tunes and evaluates every condition with five seeds, then writes
# docs/claims.md and its plots. A finished run is skipped, so that it can be stopped and resumed.
#   SEEDS=5 STEPS=150 LIMIT=100 runs/claims.sh [WORK_FOLDER]      (default: runs/out/claims)
# It prints how long it took; 25 runs of 150 steps and 20 short fine-tunings were planned for an
# hour on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/out/claims}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src
"$python" -u runs/claims/measure.py "$work" --seeds "${SEEDS:-5}" --steps "${STEPS:-150}" \
    --finetune-steps "${FINETUNE_STEPS:-60}" --limit "${LIMIT:-100}" --scale "${SCALE:-1}"
"$python" runs/claims/write.py "$work" "${DOCS:-docs}"
