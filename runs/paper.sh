#!/usr/bin/env bash
# RL4EViT at the length of an epoch of ImageNet-1k, 1.3 million games: runs/paper.sh DATA OUT [RUN...]
# The authors' code goes through some four million images.
#
# RUN is one or more of the following; all, where none is given. Runs in different processes may go on at a time.
#   fashion-code       preset rl4evit-code on the embedded model: constant step size 5e-6
#   fashion-code-fast  the same with the step size raised to LR, nothing else changed
#   fashion-paper      preset rl4evit on the embedded model: alpha / beta 240 pays for nearly all tokens
#   fashion-paper-140  the same with beta raised to 0.171, so that it prunes
#   vit-code, vit-code-fast, vit-paper, vit-paper-140   the same on ViT-Ti/16, 350 ImageNet images, GAMES_VIT games
# DATA holds vit_tiny_patch16_224.safetensors, imagenet_sample.tar and imagenet1k_synsets.txt (for vit-* alone). A run that
# was interrupted continues. OUT gets a policy, a log of metrics, what was printed, and the measurements of each run; and
# for each model curves_MODEL.png of all runs that are there. GAMES (1,300,000): seven hours each on one core with
# bfloat16, 53 games a second; GAMES_VIT (128,000): an hour and a half each.
set -euo pipefail
DATA=$(realpath "${1:?DATA: folder with weights and images}") OUT=$(realpath -m "${2:?OUT: folder to write to}")
shift 2
cd "$(dirname "$0")/.."
GAMES=${GAMES:-1300000} GAMES_VIT=${GAMES_VIT:-128000} LR=${LR:-1e-4} PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT"

tokengame() { "$PYTHON" -m tokengame "$@"; }
resume() { [[ -f $OUT/$1_log/checkpoint.pt ]] && echo --resume || true; }

learn() {  # NAME GAMES PRESET FLAGS...: the native prediction is for the curve of KL alone, so one in ten updates has it
    local name=$1 games=$2 preset=$3
    shift 3
    [[ -f $OUT/$name.done ]] && return
    # shellcheck disable=SC2046
    tokengame train --preset "$preset" "$@" --updates $((games / 64)) --reward.native-every 10 --checkpoint-every 100 \
        --output "$OUT/$name.safetensors" $(resume "$name") >>"$OUT/$name.txt" 2>&1
    touch "$OUT/$name.done"
}
measure() {  # NAME IMAGES FLAGS...: at the operating point that was learned, dial 0.5, with 95 % intervals
    local name=$1 images=$2
    shift 2
    tokengame eval "$@" --policy "$OUT/$name.safetensors" --json >"$OUT/${name}_$(basename "$images" .tar).json"
}
run() {  # NAME
    local preset=rl4evit-code raised=()
    [[ $1 == *-paper* ]] && preset=rl4evit
    [[ $1 == *-fast ]] && raised=(--ppo.lr "$LR")
    [[ $1 == *-140 ]] && raised=(--reward.beta 0.171)
    case $1 in
        fashion-*)
            learn "$1" "$GAMES" "$preset" --backbone fashion --images fashion-train --holdout 0.05 "${raised[@]}"
            for images in fashion-val fashion; do
                measure "$1" "$images" --backbone fashion --images "$images"
            done
            ;;
        vit-*)
            local of=(--backbone vit_tiny_patch16_224 --weights "$DATA/vit_tiny_patch16_224.safetensors"
                --images "$DATA/imagenet_sample.tar" --class-map "$DATA/imagenet1k_synsets.txt" --holdout 0.3)
            learn "$1" "$GAMES_VIT" "$preset" "${of[@]}" "${raised[@]}"
            measure "$1" imagenet_sample.tar "${of[@]}"
            ;;
    esac
}

known=(fashion-code fashion-code-fast fashion-paper fashion-paper-140 vit-code vit-code-fast vit-paper vit-paper-140)
[[ $# == 0 ]] && set -- "${known[@]}"
for name in "$@"; do
    [[ " ${known[*]} " == *" $name "* ]] || { echo "no run $name; there are: ${known[*]}" >&2; exit 2; }
done
for name in "$@"; do
    run "$name"
    # models apart: games differ in number and in difficulty
    "$PYTHON" runs/paper_curves.py "$OUT/curves_${name%%-*}.png" "$OUT/${name%%-*}"-*_log | tee "$OUT/curves_${name%%-*}.txt"
done
