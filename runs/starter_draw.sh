#!/usr/bin/env bash
# Trains the decoder that ships with the starter: the recipe `draw`, the Q-Former frozen, for as many
# steps as fit into MINUTES (50) on this machine. Resumes: run it again.
#   [MINUTES=50] runs/starter_draw.sh [STARTER] [WORK_FOLDER] [A.B=C ...]
# STARTER is the directory whose Q-Former the decoder reads (default: the package's own); the decoder
# is put into it as STARTER/text_to_image, in half precision. Ends with the figures of 500 prompts.
set -euo pipefail
cd "$(dirname "$0")/.."
starter=${1:-src/instructblip/starter}
work=${2:-runs/out/draw}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src
mkdir -p "$work"
[ -f "$work/steps" ] ||
    "$python" runs/draw_steps.py "${MINUTES:-50}" model.start="$starter" "${@:3}" > "$work/steps"
steps=$(cat "$work/steps")
echo "$steps steps"
"$python" -u -m instructblip train draw model.start="$starter" training.steps="$steps" \
    drawing.sets.subjects.start=$((steps / 10)) drawing.sets.two_objects.start=$((steps / 5)) \
    training.validate_every=$((steps / 4)) "${@:3}" --out "$work/run" --resume
"$python" - "$work/run/last" "$starter/text_to_image" <<'PY'
import sys
from pathlib import Path

import torch

from instructblip.text_to_image.pretrained import from_pretrained, save_addition

save_addition(from_pretrained(sys.argv[1]), Path(sys.argv[2]), torch.float16)
PY
"$python" benchmarks/draw.py --prompts 500 --model "$starter" --out "$work/drawn"
