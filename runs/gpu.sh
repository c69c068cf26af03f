#!/usr/bin/env bash
# Equality and speed on one NVIDIA GPU, native against pruned, in at most eight minutes: `bash runs/gpu.sh`. Options are
# those of runs/gpu.py ("--minutes 4"). Needs torch, timm and safetensors; no installation, no compiled kernels of ours,
# no network. A table, a JSON file and profiles go to build/gpu (or $OUT), row by row.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3 || command -v python)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout --signal INT --kill-after 10 "${LIMIT:-480}" "$python" runs/gpu.py --output "${OUT:-build/gpu}" "$@"
