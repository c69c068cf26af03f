"""Published methods and a policy in random order in one process, so that disturbances affect all of them alike:

    python runs/interleaved.py --images imagenet_sample.tar --weights vit_tiny_patch16_224.safetensors
    python runs/speed_at_agreement.py build/interleaved.csv results/quality*bfloat16*

ToMe, EViT and attention that merges, on the same kernels as the policy, each at its settings; the policy without and
with the cascade; native in its fused form. Medians over the rounds, on other images every time. With --step-by-step the
policy returns to Python at its decisions, as the peers do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import torch
import tyro

from tokengame.backbones import load_model, preprocessing_of
from tokengame.data.batches import plain_views
from tokengame.data.datasets import open_images
from tokengame.files import write_csv
from tokengame.measure.compare import CASCADE_MARGIN, baseline_entries, with_margin
from tokengame.measure.conditions import conditions
from tokengame.measure.evaluate import keep_freed_memory, timed
from tokengame.policies import Policy
from tokengame.policies.policy import find_policy
from tokengame.report.console import progress, show_rows
from tokengame.runtime import prune

PEERS = ("ToMe", "EViT", "EViT, not fusing", "attention, merge")


@dataclass
class Interleaved:
    images: Path
    """folder or archive"""
    policy: str = "vit_tiny_patch16_224"
    backbone: str = "vit_tiny_patch16_224"
    weights: Path | None = None
    """local checkpoint"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_size: int = 32
    rounds: int = 40
    step_by_step: bool = False
    output: Path = Path("build/interleaved.csv")


@torch.inference_mode()
def main(args: Interleaved) -> None:
    """Time, show, write."""
    keep_freed_memory()
    model = load_model(args.backbone, args.weights and str(args.weights)).to(getattr(torch, args.dtype))
    views = plain_views(open_images(str(args.images), "validation"), preprocessing_of(model))
    pool = torch.cat([batch.images for batch, _ in zip(views.loader(32, 1), range(5), strict=False)])
    pool = pool.to(next(model.parameters()).dtype)
    policy = Policy.load(find_policy(args.policy))
    methods = {(entry.method, entry.setting): entry.model for entry in baseline_entries(model, PEERS)}
    for name, margin, dials in ((args.policy, 0.0, (0.27, 0.38, 0.5, 0.62, 0.73)),
                                (f"{args.policy}, cascade", CASCADE_MARGIN, (0.5, 0.62, 0.73, 0.8))):  # fmt: skip
        for dial in dials:
            fast = prune(model, with_margin(policy, margin), dial)
            if args.step_by_step:  # a policy with a hook is not fused
                fast.actor.register_forward_hook(lambda *_: None)
            methods[name, f"dial {dial}"] = fast
    calls = {key: method.predict for key, method in methods.items()} | {("native", ""): model}
    seconds, compute = {key: [] for key in calls}, {key: [] for key in methods}
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for number in progress(range(-3, args.rounds), "timing", args.rounds + 3):
        images = pool[torch.randperm(len(pool), generator=generator)[: args.batch_size]]
        for key in rng.sample(list(calls), len(calls)):
            found, took = timed(images.device, calls[key], images)
            if number >= 0:
                seconds[key].append(took)
            if key in methods and number >= 0:
                native, macs = methods[key].macs(found)
                compute[key].append(float(macs.mean()) / native)
    native = median(seconds["native", ""])
    rows = [
        {"method": method, "setting": setting, "gmacs_ratio": fmean(compute[method, setting]),
         "milliseconds": 1e3 * median(seconds[method, setting]), "speedup": native / median(seconds[method, setting])}
        | conditions(pool.dtype)
        for method, setting in methods
    ]  # fmt: skip
    show_rows(rows, {key: key for key in ("method", "setting", "gmacs_ratio", "milliseconds", "speedup")})
    write_csv(rows, args.output)


if __name__ == "__main__":
    main(tyro.cli(Interleaved))
