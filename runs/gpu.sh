#!/usr/bin/env bash
# Equality and speed on one NVIDIA GPU, native against pruned, in at most eight minutes: `bash runs/gpu.sh`. Options are
# those of runs/gpu.py ("--minutes 4"). Needs torch, timm and safetensors; no installation, no compiler of C++ kernels,
# no network. A table, a JSON file and profiles go to build/gpu (or $OUT), row by row.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${OUT:-build/gpu} limit=${LIMIT:-480} status=0
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3 || command -v python)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
timeout --signal INT --kill-after 10 "$limit" "$python" runs/gpu.py --output "$output" "$@" || status=$?
[ "$status" -ne 124 ] || echo "stopped after $limit seconds; what was measured until then is in $output"
exit "$status"
