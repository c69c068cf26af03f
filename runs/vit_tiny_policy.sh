#!/usr/bin/env bash
# The shipped policy for vit_tiny_patch16_224, learned without labels on 350 ImageNet images, 150 held back.
# DATA holds vit_tiny_patch16_224.safetensors, imagenet_sample.tar and imagenet1k_synsets.txt. A run that was interrupted
# continues; "--overwrite" starts anew.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data} OUTPUT=${OUTPUT:-build/vit_tiny_patch16_224.safetensors}
resume() { [[ -f ${1%.*}_log/checkpoint.pt && "${*:2}" != *--overwrite* ]] && echo --resume || true; }
# shellcheck disable=SC2046
${BIN:-.venv/bin}/tokengame train \
    --backbone vit_tiny_patch16_224 --weights "$DATA/vit_tiny_patch16_224.safetensors" \
    --images "$DATA/imagenet_sample.tar" --class-map "$DATA/imagenet1k_synsets.txt" \
    --holdout 0.3 --seed 0 --updates 240 --gmacs-ratio 0.65 \
    --output "$OUTPUT" $(resume "$OUTPUT" "$@") "$@"
