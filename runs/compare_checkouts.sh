#!/usr/bin/env bash
# This checkout beside another one of the same project (OTHER, a folder), in turns in one run: `eval` on the 150 held-back
# ImageNet images (decisions must be the same), `bench` of DeiT-S, training throughput. Half an hour on two quiet cores.
#
#   git worktree add ../before v0.10.0; bash runs/compare_checkouts.sh ../before
set -euo pipefail
cd "$(dirname "$0")/.."
OTHER=$(cd "${1:?the folder of the other checkout}" && pwd) HERE=$PWD
DATA=$(cd "${DATA:-../shared/data}" && pwd) OUT=${OUT:-$HERE/build/checkouts} PYTHON=${PYTHON:-$HERE/.venv/bin/python}
ROUNDS=${ROUNDS:-3} SECONDS_A_ROW=${SECONDS_A_ROW:-10} DTYPE=${DTYPE:-float32}
mkdir -p "$OUT"
model=(--backbone vit_tiny_patch16_224 --weights "$DATA/vit_tiny_patch16_224.safetensors"
    --images "$DATA/imagenet_sample.tar" --class-map "$DATA/imagenet1k_synsets.txt")

run() {  # checkout, name of the output, arguments of tokengame
    (cd "$OUT" && PYTHONPATH=$1 "$PYTHON" -m tokengame "${@:3}" --json > "$2.json" 2> "$2.log") ||
        { tail "$OUT/$2.log"; exit 1; }
}
for round in $(seq "$ROUNDS"); do
    for which in before after; do
        [[ $which == before ]] && folder=$OTHER || folder=$HERE
        run "$folder" "eval_${which}_$round" eval "${model[@]}" --policy vit_tiny_patch16_224 --holdout 0.3 \
            --dtype "$DTYPE"
        rm -rf "$OUT/train_${which}_$round"{.safetensors,_log}  # of an earlier call
        run "$folder" "train_${which}_$round" train "${model[@]}" --updates 8 --holdout 0.3 --seed 0 \
            --output "$OUT/train_${which}_$round.safetensors" --dtype "$DTYPE"
        run "$folder" "bench_${which}_$round" bench --backbone deit_small_patch16_224 --dtypes "$DTYPE" \
            --seconds "$SECONDS_A_ROW" --output "$OUT/bench_${which}_$round"
        echo "round $round, $which: done"
    done
done
"$PYTHON" runs/compare_checkouts.py "$OUT"
