"""Dense features of DINOv2 ViT-S/14 at 518 pixels (1,370 tokens): native and pruned, call by call in turn.

`python runs/dense_speed.py --weights vit_small_patch14_dinov2.safetensors --images flickr_sample.tar` (two minutes)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from torch.nn.functional import cosine_similarity

import tokengame
from tokengame.backbones import load_model, preprocessing_of, unfused, wrap
from tokengame.data.batches import plain_views
from tokengame.data.datasets import open_images
from tokengame.measure.conditions import conditions
from tokengame.measure.evaluate import keep_freed_memory


@dataclass
class DenseSpeed:
    """Native is timed with fused and unfused attention and compiled; the fastest counts."""

    weights: Path
    images: str
    ratios: tuple[float, ...] = (0.7, 0.6, 0.5)
    """of the compute, that the starting rule takes"""
    number: int = 4
    """images of a batch"""
    rounds: int = 8
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    """of which images"""

    def run(self) -> None:
        """Print a line for each form: median milliseconds, speed-up over the fastest native one, cosine."""
        keep_freed_memory()
        model = load_model("vit_small_patch14_dinov2", str(self.weights), {"img_size": 518})
        images = self.photos(model)
        native = model.forward_features(images)
        dtype = getattr(torch, self.dtype)
        cast, batch = model.to(dtype), images.to(dtype)
        calls: dict[str, Callable[[torch.Tensor], Any]] = {
            "native, fused": cast.forward_features,
            "native, unfused": unfused(cast).forward_features,  # type: ignore[operator]
            "native, compiled": torch.compile(cast.forward_features),
        }
        whole = tokengame.prune(cast, keep_what="features")
        whole.dial = 0
        calls["all tokens on this runtime"] = whole.forward_features
        for ratio in self.ratios:
            fast = tokengame.prune(cast, gmacs_ratio=ratio, keep_what="features")
            calls[f"pruned to {ratio}"] = fast.forward_features
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(-2, self.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call(batch)
                seconds[name] += [time.perf_counter() - start] if number >= 0 else []
        best = min(median(times) for name, times in seconds.items() if name.startswith("native"))
        prefix = wrap(cast).prefix
        for name, call in calls.items():
            cosine = cosine_similarity(call(batch).float()[:, prefix:], native[:, prefix:], dim=2).mean()
            taken = median(seconds[name])
            print(f"{name}: {1000 * taken:.0f} ms, {best / taken:.2f} x, cosine {cosine:.4f}")
        print(conditions(dtype, "cpu"))

    def photos(self, model: Any) -> torch.Tensor:
        """[number, 3, 518, 518]"""
        source = open_images(self.images)
        chosen = torch.randperm(len(source.names), generator=torch.Generator().manual_seed(self.seed))[: self.number]
        return next(iter(plain_views(source, preprocessing_of(model), chosen.tolist()).loader(self.number, 0))).images


if __name__ == "__main__":
    with torch.inference_mode():
        tyro.cli(DenseSpeed).run()
