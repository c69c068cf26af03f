#!/usr/bin/env bash
# Three policies, each with a seed and held-back images of its own, without and with the cascade, against every baseline and
# the starting rule (budgets, and thresholds set on the images not held back: what learning adds is the difference) on
# those images; the mean over the three. A quarter of an hour on two cores with AMX, eighty minutes
# on one core without bfloat16; "--dtype float32" there (options are those of compare).
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 0 1 2; do
    folder="${OUTPUT:-build/seeds}/$seed"
    OUTPUT="$folder/vit_tiny_patch16_224.safetensors" bash runs/vit_tiny_policy.sh --seed "$seed"
    POLICY="$folder/vit_tiny_patch16_224.safetensors" OUTPUT="$folder" bash runs/compare_vit_tiny.sh \
        --seed "$seed" --no-timing --dynamicvit-updates 0 "$@"
done
"${BIN:-.venv/bin}/python" runs/mean_of.py "${OUTPUT:-build/seeds}"/*/qualities.csv
