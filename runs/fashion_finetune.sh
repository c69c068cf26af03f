#!/usr/bin/env bash
# The embedded model tuned with labels through the quickstart's policy, on a scene of every training photo of the whole
# Fashion-MNIST (FASHION, its four .gz files; Debian: dataset-fashion-mnist), then the tuned and the untuned model on a scene
# of each of its 10,000 test photos. An hour in two processes of one core each.
set -euo pipefail
cd "$(dirname "$0")/.."
FASHION=${FASHION:-/usr/share/datasets/fashion-mnist} OUTPUT=${OUTPUT:-build/fashion_finetune} BIN=${BIN:-.venv/bin}
POLICY=${POLICY:-$OUTPUT/quickstart/policy.safetensors}

resume() { [[ -f $1/checkpoint.pt ]] && echo --resume || true; }  # a run that was interrupted continues

[ -f "$POLICY" ] || "$BIN/tokengame" quickstart --output "$OUTPUT/quickstart"
# shellcheck disable=SC2046
"$BIN/torchrun" --nproc-per-node 2 -m tokengame finetune --backbone fashion --images "fashion-train:$FASHION" \
    --validate fashion-val --policy "$POLICY" --gmacs-ratio 0.34 --updates 1400 --batch-size 128 --opt muon --lr 4e-4 \
    --labels 1 --crop 0.95 --dtype float32 --output "$OUTPUT/tuned" $(resume "$OUTPUT/tuned/log") "$@"
measure() {
    "$BIN/tokengame" eval --backbone fashion --images "fashion-val:$FASHION" --gmacs-ratio 0.34 --dtype float32 "$@"
}
measure --policy "$POLICY"
measure --policy "$OUTPUT/tuned/policy.safetensors"  # beside the untuned model
# beside the tuned model with all tokens: what pruning still costs
measure --weights "$OUTPUT/tuned/model.safetensors" --policy "$OUTPUT/tuned/policy.safetensors"
