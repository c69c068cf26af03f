#!/usr/bin/env bash
# The shipped ViT-Ti/16 policy at 0.65 of the compute against all that a user could run instead, in the same run: a quarter
# of an hour on two cores, with nothing else running. The first 160 Flickr photos, 64 at batch 1. JSON files go to OUT,
# by default results/.
# bash runs/rivals.sh [DATA [dtype ...]]    DATA holds the weights and flickr_sample.tar
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared/data} out=${OUT:-results}
mkdir -p "$out"
shift || true
[ $# -gt 0 ] || set -- float32 bfloat16
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
photos=$(mktemp -d)
trap 'rm -rf "$photos"' EXIT
tar -xf "$data/flickr_sample.tar" -C "$photos"
for number in 64 160; do
  (cd "$photos" && find . -name '*.JPEG' | sort | sed -n "1,${number}p" | tar -cf "flickr_$number.tar" -T -)
done
for dtype in "$@"; do
  for batch in 1 8 32; do
    "${BIN:-.venv/bin}/tokengame" eval --backbone vit_tiny_patch16_224 --weights "$data/vit_tiny_patch16_224.safetensors" \
      --policy vit_tiny_patch16_224 --gmacs-ratio 0.65 --images "$photos/flickr_$([ "$batch" = 1 ] && echo 64 || echo 160).tar" \
      --dtype "$dtype" --batch-size "$batch" --rivals --workers 0 --json >"$out/rivals_vit_tiny_${dtype}_batch$batch.json"
  done
done
