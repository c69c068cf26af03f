#!/usr/bin/env bash
# DINOv2 ViT-S/14: policies for embeddings and for dense features, beside the starting rule and the peers.
# Learned and calibrated on ImageNet photos, measured on Flickr photos. Some 40 minutes on two cores with AMX.
# bash runs/dinov2.sh DATA OUTPUT      DATA holds the weights and both archives; a second run goes on where one stopped
set -euo pipefail
data=${1:-../shared/data} out=${2:-dinov2} tokengame=${TOKENGAME:-tokengame}
model="--backbone vit_small_patch14_dinov2 --weights $data/vit_small_patch14_dinov2.safetensors"
small="$model --model-kwargs img_size=224" large="$model --model-kwargs img_size=518"
learn="--images $data/imagenet_sample.tar" measure="--images $data/flickr_sample.tar"
mkdir -p "$out"

for what in features embedding; do
  learned=$out/dinov2_$what.safetensors rule=$out/rule_$what.safetensors
  [ -f "$out/$what.done" ] || {
    resume=$([ -d "$out/dinov2_${what}_log" ] && echo --resume || true)
    # shellcheck disable=SC2086
    $tokengame train $small $learn --keep-what $what --game.stages 3 4 5 6 7 8 --actor.keep 0.92 \
      --updates "${UPDATES:-400}" --output "$learned" $resume
    python - "$data" "$what" "$rule" <<'PYTHON'
import sys

import tokengame
from tokengame.backbones import load_model

data, what, rule = sys.argv[1:]
model = load_model("vit_small_patch14_dinov2", f"{data}/vit_small_patch14_dinov2.safetensors", {"img_size": 224})
fast = tokengame.prune(model, images=f"{data}/imagenet_sample.tar", keep_what=what)  # thresholds set on 256 of them
tokengame.Policy(fast.actor, fast.card).save(rule)
PYTHON
    touch "$out/$what.done"
  }
  $tokengame compare $small $measure --keep-what $what --policies "$rule" "$learned" --dtype bfloat16 --no-timing \
    --baselines ToMe EViT rule "attention, merge" --output "$out/compare_$what"
done

# speed at 1,370 tokens: the native model is the faster one of fused and unfused attention
$tokengame compare $large $measure --keep-what features --policies "$out/dinov2_features.safetensors" \
  --dials 0.2 0.35 0.5 0.65 --baselines ToMe rule --dtype bfloat16 --batch-size 8 --output "$out/compare_518"
