#!/usr/bin/env bash
# What each part of learning is worth: six trainings, three seeds each, on ViT-Ti/16. Eighty minutes on one core with
# AMX, two and a half hours without; an interrupted run continues from build/ablations.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
"${BIN:-.venv/bin}/tokengame" ablate \
    --backbone vit_tiny_patch16_224 --weights "$DATA/vit_tiny_patch16_224.safetensors" \
    --images "$DATA/imagenet_sample.tar" --class-map "$DATA/imagenet1k_synsets.txt" \
    --holdout 0.3 --updates 80 --output "${OUTPUT:-build/ablations}" "$@"
