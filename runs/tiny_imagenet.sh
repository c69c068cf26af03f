#!/usr/bin/env bash
# Tiny-ImageNet (64 x 64 photos, shown at 224 x 224): a policy learned on 9,600 of its training images, then that one and
# the shipped one on the 5,000 validation images, and both against the peers on 1,000 of them. About
# eleven minutes on two cores with AMX, an hour and a half on one without (DTYPE=float32 there); speeds need two that do
# nothing else. The policy that ships as vit_tiny_patch16_224_tiny_imagenet was learned in float32.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data} OUTPUT=${OUTPUT:-build/tiny_imagenet} DTYPE=${DTYPE:-bfloat16}
common=(--backbone vit_tiny_patch16_224 --weights "$DATA/vit_tiny_patch16_224.safetensors"
    --class-map "$DATA/imagenet1k_synsets.txt")
tokengame() { "${BIN:-.venv/bin}/tokengame" "$@"; }
resume() { [[ -f $1/checkpoint.pt ]] && echo --resume || true; }  # a run that was interrupted continues

# shellcheck disable=SC2046
tokengame train "${common[@]}" --images "$DATA/tiny_imagenet_train.tar" --holdout 0.05 --updates 300 \
    --gmacs-ratio 0.62 --output "$OUTPUT/tiny_imagenet.safetensors" $(resume "$OUTPUT/tiny_imagenet_log")
for policy in vit_tiny_patch16_224 "$OUTPUT/tiny_imagenet.safetensors"; do
    tokengame eval "${common[@]}" --images "$DATA/tiny_imagenet_val.tar" --policy "$policy" --gmacs-ratio 0.62 \
        --batch-size 64 --dtype "$DTYPE"
done
tokengame compare "${common[@]}" --images "$DATA/tiny_imagenet_val.tar" --holdout 0.2 --no-timing --dtype "$DTYPE" \
    --policies vit_tiny_patch16_224 "$OUTPUT/tiny_imagenet.safetensors" --output "$OUTPUT/compare"
