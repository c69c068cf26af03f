#!/usr/bin/env bash
# The shipped ViT-Ti/16 policy at 0.65 of the compute against all that a user could run instead, in the same run: half an
# hour on two cores, with nothing else running. JSON files go to results/.
# bash runs/rivals.sh DATA [dtype ...]     DATA holds the weights and flickr_sample.tar
set -euo pipefail
data=$(realpath "${1:-../shared/data}")
cd "$(dirname "$0")/.."
shift || true
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
[ $# -gt 0 ] || set -- float32 bfloat16
for dtype in "$@"; do
  for batch in 1 8 32; do
    "${BIN:-.venv/bin}/tokengame" eval --backbone vit_tiny_patch16_224 --weights "$data/vit_tiny_patch16_224.safetensors" \
      --policy vit_tiny_patch16_224 --gmacs-ratio 0.65 --images "$data/flickr_sample.tar" --dtype "$dtype" \
      --batch-size "$batch" --rivals --workers 0 --json >"results/rivals_vit_tiny_${dtype}_batch$batch.json"
  done
done
