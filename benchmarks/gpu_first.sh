#!/bin/sh
# The first ten minutes on a GPU: checks what cannot be checked without one, trains 20 steps of each
# full-size recipe on random weights and random images, and writes a table into the folder of --out.
#
#     sh benchmarks/gpu_first.sh
#     sh benchmarks/gpu_first.sh --device cpu --sizes tiny tiny-t5 --steps 6     # a dry run
#
# Afterwards: CUDA_VISIBLE_DEVICES= make test, and pytest tests/model/test_attention.py -k kernel
set -eu
cd "$(dirname "$0")/.."
# rows have another length in each step
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
fi
exec "${PYTHON:-python}" -m benchmarks.gpu_first "$@"
