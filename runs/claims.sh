#!/usr/bin/env bash
# The paper's claims on Scenes: tunes and evaluates every condition with five seeds, then writes
# docs/claims.md and its plots. The same command resumes an interrupted session.
#   runs/claims.sh [WORK_FOLDER] [--seeds 5] [--steps 150] [--limit 100] ...   (default: runs/out/claims)
# DOCS names another folder for the page, PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
work=runs/out/claims
if [[ $# -gt 0 && $1 != -* ]]; then work=$1; shift; fi
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src:.
"$python" -u -m runs.claims.measure "$work" "$@"
"$python" -m runs.claims.write "$work" "${DOCS:-docs}"
