#!/usr/bin/env bash
# Every method on ViT-Ti/16 and the ImageNet images that the policy was not trained on: table, CSV, frontier.png in
# build/compare. Policies run without and with the cascade. About 14 minutes on two cores with AMX, 25 on
# others, with nothing else running.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
"${BIN:-.venv/bin}/tokengame" compare \
    --backbone vit_tiny_patch16_224 --weights "$DATA/vit_tiny_patch16_224.safetensors" \
    --images "$DATA/imagenet_sample.tar" --class-map "$DATA/imagenet1k_synsets.txt" \
    --holdout 0.3 --seed 0 --dtype bfloat16 --dynamicvit-updates 150 --budgets \
    --policies "${POLICY:-vit_tiny_patch16_224}" --output "${OUTPUT:-build/compare}" "$@"
