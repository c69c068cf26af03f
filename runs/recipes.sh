#!/usr/bin/env bash
# Both recipes of fine-tuning on the embedded model, with labels, through one policy at a third of the compute and for as
# many updates: ours, and the one of RL4EViT's authors. Half an hour on one core; an interrupted run continues.
set -euo pipefail
cd "$(dirname "$0")/.."
OUTPUT=${OUTPUT:-build/recipes} UPDATES=${UPDATES:-300} PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUTPUT"

resume() { [[ -f $1/checkpoint.pt ]] && echo --resume || true; }
tune() {  # NAME FLAGS...
    # shellcheck disable=SC2046
    "$PYTHON" -m tokengame finetune --backbone fashion --images fashion-train --validate fashion-val \
        --policy "$OUTPUT/policy.safetensors" --gmacs-ratio 0.34 --updates "$UPDATES" --batch-size 64 "${@:2}" \
        --output "$OUTPUT/$1" $(resume "$OUTPUT/$1/log") --json >"$OUTPUT/$1.json"
}

# shellcheck disable=SC2046
[[ -f $OUTPUT/policy.safetensors ]] || "$PYTHON" -m tokengame train --backbone fashion --images fashion-train \
    --holdout 0.05 --game.stages 1 4 --target-kl 0.03 --updates 150 --output "$OUTPUT/policy.safetensors" \
    $(resume "$OUTPUT/policy_log")
[[ -s $OUTPUT/ours.json ]] || tune ours --labels 1 --lr 1e-4 --crop 0.95
[[ -s $OUTPUT/paper.json ]] || tune paper --recipe paper
for name in ours paper; do
    "$PYTHON" - "$OUTPUT/$name.json" <<'PYTHON'
import json
import sys

found = json.load(open(sys.argv[1]))
for when in ("before", "after"):
    row = found[when]
    low, high = row["drop_pp_ci95"]
    print(f"{sys.argv[1]} {when}: top-1 {100 * row['top1_pruned']:.2f}, lost {row['drop_pp']:.2f} ({low:.2f} to {high:.2f}), "
          f"compute {row['gmacs_ratio']:.3f}, KL {row['kl']:.3f}")
PYTHON
done
