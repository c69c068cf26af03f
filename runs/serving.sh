#!/usr/bin/env bash
# The table of docs/serving.md: 10,000 requests to each of two servers on loopback, three minutes on two cores, with
# nothing else running. The file goes to results/.
# bash runs/serving.sh [DATA]    DATA holds the weights and flickr_sample.tar
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
data=$(cd "${1:-$here/../shared/data}" && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
ln -s "$data/vit_tiny_patch16_224.safetensors" "$data/flickr_sample.tar" .
"${PYTHON:-$here/.venv/bin/python}" "$here/examples/load_test.py" --backbone vit_tiny_patch16_224 \
  --weights vit_tiny_patch16_224.safetensors --images flickr_sample.tar --requests "${REQUESTS:-10000}" --rounds 20 \
  --output serving.csv
cp serving.csv "$here/results/serving_vit_tiny_patch16_224_flickr500_concurrency32_float32_cpu-2threads.csv"
