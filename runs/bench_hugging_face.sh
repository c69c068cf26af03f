#!/usr/bin/env bash
# Models of Hugging Face at their own sizes, random weights, pruned beside native: 0.70, 0.49 and 0.34 of the tokens kept
# after blocks 3, 6 and 9, merge, float32, batch 1 and 8. Five minutes on two cores with nothing else running.
# bash runs/bench_hugging_face.sh [FLAGS of tokengame bench...]
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin} models=build/hugging_face
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
"$BIN/python" - "$models" <<'PYTHON'
import sys

import torch
import transformers as hf

small = {"hidden_size": 384, "num_attention_heads": 6}
tiny = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
torch.manual_seed(0)
for name, model in {
    "vit_tiny": hf.ViTForImageClassification(hf.ViTConfig(**tiny, num_labels=1000)),
    "clip_base_32": hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(projection_dim=512)),
    "siglip_base_16": hf.SiglipVisionModel(hf.SiglipVisionConfig()),
    "dinov2_small_14": hf.Dinov2Model(hf.Dinov2Config(**small, image_size=224)),
    "dinov3_small_16": hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**small, intermediate_size=1536, num_register_tokens=4)),
}.items():
    model.save_pretrained(f"{sys.argv[1]}/{name}")
PYTHON
for model in "$models"/*; do
  "$BIN/tokengame" bench --backbone "$model" --transition merge --stages 3 6 9 --keep 0.7 0.49 0.34 --dtypes float32 \
    --no-compiled --batch-sizes 1 8 --seconds "${SECONDS_EACH:-4}" --output "${OUT:-results}" "$@"
done
