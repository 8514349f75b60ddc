#!/usr/bin/env bash
# What drawing costs understanding when the Q-Former trains with it: a tuned model answers Scenes, is
# trained to draw with every second micro batch an answer or a caption, answers again; the two are
# compared sample by sample. Two cores: about 15 minutes.
#   [STEPS=200] runs/draw_understanding.sh [MODEL] [SCENES] [WORK_FOLDER] [A.B=C ...]
# MODEL and SCENES are what `instructblip quickstart` leaves (out/quickstart/run/last and .../scenes).
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-out/quickstart/run/last}
data=${2:-out/quickstart/scenes}
work=${3:-runs/out/draw_understanding}
steps=${STEPS:-200}
export PYTHONPATH=src
instructblip() { "${PYTHON:-.venv/bin/python}" -u -m instructblip "$@"; }

instructblip train draw model.start="$model" data.root="$data" drawing.understanding=0.5 \
    'training.trainable=[drawing,qformer]' training.optimizer=adamw training.learning_rate=2.0e-4 \
    training.batch_size=64 training.accumulate=2 training.steps="$steps" training.warmup_steps=20 \
    training.validate_every=null drawing.decoder.noise_levels=1 "${@:4}" --out "$work/run" --resume
instructblip evaluate quickstart "$model" data.root="$data" --out "$work/before"
instructblip evaluate quickstart "$work/run/last" data.root="$data" --out "$work/after"
instructblip compare "$work/before" "$work/after" --intervals
