#!/usr/bin/env bash
# Trains the decoder that ships with the starter: the recipe `draw`, the Q-Former frozen. Resumes.
#   runs/starter_draw.sh [STARTER] [WORK_FOLDER] [A.B=C ...]
# STARTER is the directory whose Q-Former the decoder reads (default: the package's own); the decoder
# is put into it as STARTER/text_to_image, in half precision.
set -euo pipefail
cd "$(dirname "$0")/.."
starter=${1:-src/instructblip/starter}
work=${2:-runs/out/draw}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src
"$python" -u -m instructblip train draw model.start="$starter" "${@:3}" --out "$work" --resume
"$python" - "$work/last" "$starter/text_to_image" <<'PY'
import sys
from pathlib import Path

import torch

from instructblip.text_to_image.pretrained import from_pretrained, save_addition

save_addition(from_pretrained(sys.argv[1]), Path(sys.argv[2]), torch.float16)
PY
"$python" benchmarks/draw.py --prompts 500 --model "$starter" --out "$work/drawn"
