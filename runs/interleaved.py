"""EViT and a policy in random turns in one process, so that whatever the machine does happens to all of them alike:

    python runs/in_turn.py --images imagenet_sample.tar --weights vit_tiny_patch16_224.safetensors
    python runs/clock_of.py build/in_turn.csv results/quality*bfloat16*

Each method at several settings, the policy looking once and twice, native the fused form; medians over the rounds, of
other images every time. With --step-by-step the policy comes back to Python at its decisions, as the peers do.
"""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import torch
import tyro

from tokengame.baselines import EViT
from tokengame.bench import write_csv
from tokengame.compare import KEEP, SECOND_LOOK, looking
from tokengame.console import progress, show_rows
from tokengame.data import plain_views
from tokengame.evaluate import keep_heap, run, timed
from tokengame.images import open_images
from tokengame.models import load_model, preprocessing_of
from tokengame.policy import Policy
from tokengame.runtime import find_policy, prune


@dataclass
class InTurn:
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
    output: Path = Path("build/in_turn.csv")


@torch.inference_mode()
def main(args: InTurn) -> None:
    """Race, show, write."""
    keep_heap()
    model = load_model(args.backbone, args.weights and str(args.weights)).to(getattr(torch, args.dtype))
    views = plain_views(open_images(str(args.images), "validation"), preprocessing_of(model))
    pool = torch.cat([batch.images for batch, _ in zip(views.loader(32, 1), range(5), strict=False)])
    pool = pool.to(next(model.parameters()).dtype)
    policy = Policy.load(find_policy(args.policy))
    if args.step_by_step:  # who is watched is not played in one call
        policy.actor.register_forward_hook(lambda *_: None)
    methods = {("EViT, not fusing", f"keep {k}"): EViT(model, k, fuse=False) for k in KEEP}
    for name, margin, dials in ((args.policy, 0.0, (0.27, 0.38, 0.5, 0.62, 0.73)),
                                (f"{args.policy}, two looks", SECOND_LOOK, (0.5, 0.62, 0.73, 0.8))):  # fmt: skip
        methods |= {(name, f"dial {dial}"): prune(model, looking(policy, margin), dial) for dial in dials}
    calls = {key: partial(run, method) for key, method in methods.items()} | {("native", ""): model}
    seconds, compute = {key: [] for key in calls}, {key: [] for key in methods}
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for number in progress(range(-3, args.rounds), "racing", args.rounds + 3):
        images = pool[torch.randperm(len(pool), generator=generator)[: args.batch_size]]
        for key in rng.sample(list(calls), len(calls)):
            found, took = timed(images.device, calls[key], images)
            if number >= 0:
                seconds[key].append(took)
            if key in methods and number >= 0:
                native, macs = methods[key].macs(found[0])
                compute[key].append(float(macs.mean()) / native)
    native = median(seconds["native", ""])
    rows = [
        {"method": method, "setting": setting, "gmacs_ratio": fmean(compute[method, setting]),
         "milliseconds": 1e3 * median(seconds[method, setting]), "speedup": native / median(seconds[method, setting])}
        for method, setting in methods
    ]  # fmt: skip
    show_rows(rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.output)


if __name__ == "__main__":
    main(tyro.cli(InTurn))
