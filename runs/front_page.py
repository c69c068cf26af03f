"""The table of README.md: native, all tokens on tokengame's runtime, a policy, ToMe and EViT at the same compute.

    python runs/front_page.py --images flickr_sample.tar --weights vit_tiny_patch16_224.safetensors \\
        --class-map imagenet1k_synsets.txt

Quality is measured on all images. Speed is measured in one process: every round takes another batch and runs all models
on it in random order; medians. Native is the faster of fused and unfused attention. ToMe and EViT get the setting whose
multiply-accumulates are nearest to the policy's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from tokengame.backbones import load_model, preprocessing_of, unfused, wrap
from tokengame.baselines.evit import EViT
from tokengame.baselines.tome import ToMe, tome_at
from tokengame.data.batches import BadImages, checked, plain_views
from tokengame.data.datasets import label_images, open_images
from tokengame.files import write_csv
from tokengame.measure.conditions import conditions
from tokengame.measure.evaluate import keep_freed_memory, timed
from tokengame.measure.scores import Scores
from tokengame.report.console import console, progress, show_rows
from tokengame.runtime import prune
from tokengame.runtime.method import Method

SHOWN = ("model", "top1", "agreement", "gmacs", "images_per_second", "speedup")


@dataclass
class FrontPage:
    images: Path
    """folder or archive of labelled images"""
    class_map: Path
    """class names in the model's order, one a line"""
    policy: str = "vit_tiny_patch16_224"
    backbone: str = "vit_tiny_patch16_224"
    weights: Path | None = None
    """local checkpoint"""
    gmacs_ratio: float | None = None
    """operating point; default is the policy's recommendation"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 32
    rounds: int = 30
    threads: int = 2
    output: Path = Path("build/front_page.csv")


def methods_for(model: nn.Module, args: FrontPage, images: Tensor) -> dict[str, Method]:
    """The models of the table but the native one."""
    fast, backbone = prune(model, args.policy, gmacs_ratio=args.gmacs_ratio), wrap(model)
    macs = float(fast.macs(fast.predict(images))[1].mean())
    keeps = [EViT(model, keep) for keep in np.linspace(0.4, 0.95, 56)]
    evit = min(keeps, key=lambda method: abs(float(method.macs(method.predict(images[:1]))[1]) - macs))
    unpruned = ToMe(model, (0,) * backbone.depth)
    return {"all tokens": unpruned, "tokengame": fast, "ToMe": tome_at(model, macs, backbone.patches), "EViT": evit}


@torch.inference_mode()
def main(args: FrontPage) -> None:
    """Measure quality, then speed; show and write."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    model = load_model(args.backbone, args.weights and str(args.weights)).to(getattr(torch, args.dtype))
    source = open_images(str(args.images), "validation")
    label_images(source, str(args.class_map), wrap(model).classes)
    loader, tally = (
        plain_views(source, preprocessing_of(model)).loader(args.batch_size, 1),
        BadImages(len(source.names)),
    )
    batches = list(progress(checked(loader, tally), "reading", len(loader)))
    pool = torch.cat([batch.images for batch in batches]).to(getattr(torch, args.dtype))
    methods = methods_for(model, args, pool[: args.batch_size])
    scores = {name: Scores() for name in methods}
    for batch in progress(batches, "scoring", len(batches)):
        images = batch.images.to(pool.dtype)
        native = model(images).float()
        for name, method in methods.items():
            scores[name].add(method, batch, native, method.predict(images))
    calls: dict[str, Callable[[Tensor], Any]] = {name: method.predict for name, method in methods.items()}
    seconds = time_all(calls | {"fused": model, "unfused": unfused(model)}, pool, args)
    rows = table(scores, seconds, args.batch_size)
    rows = [row | conditions(pool.dtype) | {"batch_size": args.batch_size, "images": len(pool)} for row in rows]
    show_rows(rows, {key: key for key in SHOWN})
    write_csv(rows, args.output)
    console.print(f"wrote {args.output}", markup=False)


def time_all(calls: dict[str, Callable], pool: Tensor, args: FrontPage) -> dict[str, float]:
    """Median seconds of each call on a batch."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for number in progress(range(-2, args.rounds), "timing", args.rounds + 2):
        images = pool[torch.randperm(len(pool), generator=generator)[: args.batch_size]]
        for name in rng.sample(list(calls), len(calls)):
            took = timed(images.device, calls[name], images)[1]
            if number >= 0:
                seconds[name].append(took)
    return {name: median(times) for name, times in seconds.items()}


def table(scores: dict[str, Scores], seconds: dict[str, float], batch_size: int) -> list[dict[str, Any]]:
    """A row a model, native first."""
    form = min(("fused", "unfused"), key=lambda name: seconds[name])
    summaries = {name: found.summary() for name, found in scores.items()}
    first = summaries["tokengame"]
    rows = [{"model": f"native, {form} attention", "top1": first["top1_native"], "drop_pp": 0.0,
             "drop_pp_ci95": [0.0, 0.0], "agreement": 1.0, "kl": 0.0, "gmacs": first["gmacs_native"],
             "images_per_second": batch_size / seconds[form], "speedup": 1.0,
             "speedup_over_all_tokens": None}]  # fmt: skip
    for name, found in summaries.items():
        rows.append({
            "model": name,
            "top1": found["top1_pruned"],
            "drop_pp": found["drop_pp"],
            "drop_pp_ci95": found["drop_pp_ci95"],
            "agreement": found["agreement"],
            "kl": found["kl"],
            "gmacs": found["gmacs_pruned"],
            "images_per_second": batch_size / seconds[name],
            "speedup": seconds[form] / seconds[name],
            "speedup_over_all_tokens": seconds["all tokens"] / seconds[name],
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main(tyro.cli(FrontPage))
