#!/usr/bin/env bash
# The bench tables of docs/results.md: about 50 minutes on two cores, with nothing else running; a fifth of that with
# "--dtypes bfloat16 --seconds 6" (options are those of bench). CSV files go to results/.
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--keep 0.7 0.49 0.34 --batch-sizes 1 8 32 --seconds 12 "$@")
bench() { "${BIN:-.venv/bin}/tokengame" bench "${options[@]}" "$@"; }

bench --backbone deit_small_patch16_224 --tome
bench --backbone vit_tiny_patch16_224
bench --backbone vit_tiny_patch16_224 --transition merge --stages 3 6 9
bench --backbone deit_small_patch16_224 --transition merge --stages 3 6 9
bench --backbone deit_base_patch16_224
bench --backbone deit_base_patch16_224 --transition merge --stages 3 6 9
