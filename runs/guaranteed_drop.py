"""How often the guarantee `max_drop` fails: many random draws of calibration images from a labelled population.

The population is all images given. Each time images are drawn from it, every dial is calibrated on them, the dial for
each `max_drop` is chosen as `prune(model, policy, max_drop=...)` does, and its loss on the population is looked up.

    python runs/guaranteed_drop.py --images tiny_imagenet_val.tar --weights vit_tiny_patch16_224.safetensors \\
        --class-map imagenet1k_synsets.txt
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from tokengame.backbones import load_model, preprocessing_of
from tokengame.data.batches import BadImages, checked, plain_views
from tokengame.data.datasets import label_images, open_images
from tokengame.measure.conditions import conditions
from tokengame.measure.evaluate import CALIBRATION_DIALS
from tokengame.measure.risk import upper_bound
from tokengame.policies.policy import certified
from tokengame.report.console import progress, show_rows
from tokengame.runtime import prune


@dataclass
class GuaranteedDrop:
    images: Path
    """folder or archive of labelled images"""
    policy: str = "vit_tiny_patch16_224"
    backbone: str = "vit_tiny_patch16_224"
    weights: Path | None = None
    """local checkpoint"""
    class_map: Path | None = None
    """class names in the model's order, one a line"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    splits: int = 200
    share: float = 0.5
    """of the images that calibrates"""
    max_drop: tuple[float, ...] = (0.5, 1.0, 2.0)
    output: Path = Path("build/guaranteed_drop.json")


@torch.inference_mode()
def lost_and_gained(args: GuaranteedDrop) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """[dials, images]: 1 where native alone is right, -1 where pruned alone is; and compute; and the dials."""
    model = load_model(args.backbone, args.weights and str(args.weights)).to(getattr(torch, args.dtype))
    source = open_images(str(args.images), "validation")
    label_images(source, args.class_map and str(args.class_map), model.num_classes)
    fast, dials = prune(model, args.policy), sorted(CALIBRATION_DIALS)
    views = plain_views(source, preprocessing_of(model))
    loader = views.loader(50, 1)
    lost, compute = [], []
    for batch in progress(checked(loader, BadImages(len(source.names))), "measuring every dial", len(loader)):
        images = batch.images.to(next(model.parameters()).dtype)
        native = (model(images).argmax(1) == batch.labels).int()
        rows = []
        for fast.dial in dials:
            output = fast.predict(images)
            rows.append((native - (output.logits.argmax(1) == batch.labels).int(), fast.macs(output)))
        lost.append(torch.stack([row[0] for row in rows]))
        compute.append(torch.stack([row[1][1] / row[1][0] for row in rows]))
    return torch.cat(lost, 1).numpy(), torch.cat(compute, 1).numpy(), dials


def main(args: GuaranteedDrop) -> None:
    """Measure, split, count."""
    lost, compute, dials = lost_and_gained(args)
    population, ratio = 100 * lost.mean(1), compute.mean(1)
    rng, size = np.random.default_rng(0), round(args.share * lost.shape[1])
    known: dict[tuple[int, int], float] = {}
    picks: dict[float, list[int]] = {most: [] for most in args.max_drop}
    for _ in progress(range(args.splits), "splitting", args.splits):
        part = lost[:, rng.integers(lost.shape[1], size=size)]  # with replacement: the population is all images given
        bounds = []
        for row in part:
            counts = int((row == 1).sum()), int((row == -1).sum())
            if counts not in known:
                known[counts] = 100 * upper_bound(*counts, size)
            bounds.append(known[counts])
            if bounds[-1] > max(args.max_drop):
                break
        for most, pick in picks.items():
            pick.append(certified(bounds, most))
    rows = []
    for most, pick in picks.items():
        losses = [population[n - 1] if n else 0.0 for n in pick]
        ratios = [ratio[n - 1] if n else 1.0 for n in pick]
        rows.append({
            "max drop": most,
            "failed": float(np.mean([loss > most for loss in losses])),
            "mean loss": float(np.mean(losses)),
            "worst loss": float(np.max(losses)),
            "compute": float(np.mean(ratios)),
            "splits": args.splits,
            "calibration images": size,
        })  # fmt: skip
    show_rows(rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    dials_table = [
        {"dial": d, "compute": float(r), "loss": float(p)} for d, r, p in zip(dials, ratio, population, strict=True)
    ]
    args.output.write_text(
        json.dumps(
            {"guarantees": rows, "population": dials_table, "conditions": conditions(getattr(torch, args.dtype))},
            indent=1,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(GuaranteedDrop))
