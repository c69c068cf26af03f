#!/usr/bin/env bash
# The shipped ViT-Ti/16 policy at 0.65 of the compute in ONNX Runtime and OpenVINO, beside the native model in the same
# engine: five minutes on two cores with nothing else running. The first 64 Flickr photos. Once with counts that adapt to
# the image and once with fixed ones, and what fixed ones cost in agreement on all 500. Files go to results/.
# bash runs/export.sh [DATA]    DATA holds the weights and flickr_sample.tar
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p build/export
for file in pruned.onnx pruned.xml; do
  for batch in 1 8; do
    for counts in "" fixed-counts; do
      "${BIN:-.venv/bin}/tokengame" export --backbone vit_tiny_patch16_224 --weights "$data/vit_tiny_patch16_224.safetensors" \
        --policy vit_tiny_patch16_224 --gmacs-ratio 0.65 --images "$data/flickr_sample.tar" --output "build/export/$file" \
        --batch-size $batch ${counts:+--$counts} --workers 0 --json \
        >"results/export_vit_tiny_${file#pruned.}_batch$batch${counts:+_$counts}.json"
    done
  done
done
"${BIN:-.venv/bin}/python" runs/fixed_counts.py --weights "$data/vit_tiny_patch16_224.safetensors" \
  --images "$data/flickr_sample.tar" --output results/fixed_counts_vit_tiny_flickr500.csv
