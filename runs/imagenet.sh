#!/usr/bin/env bash
# The paper's setting on ImageNet-1k for one backbone: one epoch of reinforcement learning on the frozen network, fine-tuning
# through the policy, and the tables. Called by imagenet_deit_small.sh and imagenet_deit_base.sh.
#
#   TRAIN=imagenet/train VAL=imagenet/val bash runs/imagenet_deit_small.sh
#   TRAIN='shards/train-{0000..1023}.tar' VAL='shards/val-*.tar' bash runs/imagenet_deit_small.sh
#   LAUNCH='accelerate launch --num_processes 8 -m' ... bash runs/imagenet_deit_base.sh     several GPUs
#   bash runs/imagenet_deit_small.sh --dry-run         two updates of both steps; says how long all would take here
#
# Also: OUT the folder to write to, PRESET=rl4evit to learn by the paper's own reward, BATCH images an update, EPOCHS of
# fine-tuning, WORKERS a process, WEIGHTS a local checkpoint (else timm downloads its own), BIN the folder of python. A run that
# was interrupted continues when the script is started again. We had no ImageNet-1k: only --dry-run has been run.
set -euo pipefail
BACKBONE=$1 RATIO=$2 DRY=${3:-}
BIN=${BIN:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin}
OUT=${OUT:-imagenet_${BACKBONE%%.*}} PRESET=${PRESET:-tokengame} BATCH=${BATCH:-256} EPOCHS=${EPOCHS:-10}
read -ra LAUNCHER <<< "${LAUNCH:-python -m}"
: "${TRAIN:?a folder of class folders, a tar, tar shards or a Hugging Face data set}" "${VAL:?likewise, to measure on}"
IMAGES=1281167 UPDATES=$((IMAGES / BATCH))
mkdir -p "$OUT"
MODEL=(--backbone "$BACKBONE" --workers "${WORKERS:-8}" ${WEIGHTS:+--weights "$WEIGHTS"})

tokengame() { PATH="$BIN:$PATH" "${LAUNCHER[@]}" tokengame "$@"; }
alone() { PATH="$BIN:$PATH" python -m tokengame "$@"; }
resume() { [[ -f $1/checkpoint.pt ]] && echo --resume || true; }

LEARN=(--preset "$PRESET" --batch-size "$BATCH" --holdout 0.01)
TUNE=(--batch-size "$BATCH" --validate "$VAL" --labels 0.5 --distill 0.5 --ema 0.9998 --aa rand-m9-mstd0.5-inc1)
if [[ $DRY == --dry-run ]]; then
  tokengame train "${MODEL[@]}" --images "$TRAIN" "${LEARN[@]}" --updates "$UPDATES" --dry-run
  # Fine-tuning goes through a policy that has hardly learned, at a dial where about as many tokens leave as later.
  alone train "${MODEL[@]}" --images "$VAL" --split validation --preset "$PRESET" --updates 1 --batch-size 16 \
    --holdout 0.002 --output "$OUT/rehearsal.safetensors" --overwrite
  [[ $PRESET == tokengame ]] && DIAL=0.75 || DIAL=0.5
  tokengame finetune "${MODEL[@]}" --images "$TRAIN" "${TUNE[@]}" --policy "$OUT/rehearsal.safetensors" \
    --dial "$DIAL" --updates $((UPDATES * EPOCHS)) --dry-run
  exit
fi

# shellcheck disable=SC2046
[[ -f $OUT/policy.done ]] || tokengame train "${MODEL[@]}" --images "$TRAIN" "${LEARN[@]}" --updates "$UPDATES" \
  --gmacs-ratio "$RATIO" --output "$OUT/policy.safetensors" $(resume "$OUT/policy_log")
touch "$OUT/policy.done"
# shellcheck disable=SC2046
[[ -f $OUT/tuned.done ]] || tokengame finetune "${MODEL[@]}" --images "$TRAIN" "${TUNE[@]}" --output "$OUT/tuned" \
  --policy "$OUT/policy.safetensors" --updates $((UPDATES * EPOCHS)) $(resume "$OUT/tuned/log")
touch "$OUT/tuned.done"
alone compare "${MODEL[@]}" --images "$VAL" --batch-size "$BATCH" --dtype bfloat16 --output "$OUT/compare" \
  --policies "$OUT/policy.safetensors" "$OUT/tuned/policy.safetensors"
