"""What fixed counts cost: the shipped ViT-Ti/16 policy with counts that adapt to the image, and with their means.

python runs/fixed_counts.py --weights WEIGHTS --images flickr_sample.tar

Agreement with the native model and KL divergence from it, float32, at several ratios of the compute. The means are
those of 64 images, as `tokengame export --fixed-counts` takes them; the others are measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from tokengame.backbones import load_model, preprocessing_of
from tokengame.data.batches import plain_views
from tokengame.data.datasets import open_images
from tokengame.deploy.fixed import with_fixed_counts
from tokengame.files import write_csv
from tokengame.measure.conditions import conditions
from tokengame.measure.fidelity import fidelity_loss
from tokengame.report.console import progress, show_rows
from tokengame.runtime import PrunedViT, prune

NAME = "vit_tiny_patch16_224"
SAMPLE = 64
"""images whose means are taken"""


@dataclass
class Arguments:
    """What is measured."""

    weights: Path
    """of the native model"""
    images: Path
    """photos; the policy was learned and calibrated on others"""
    ratios: tuple[float, ...] = (0.8, 0.65, 0.5)
    """pruned / native compute, by the policy's calibration"""
    output: Path = Path("build/fixed_counts.csv")


def main(args: Arguments) -> None:
    model = load_model(NAME, str(args.weights))
    loader = plain_views(open_images(str(args.images), "validation"), preprocessing_of(model)).loader(32, 0)
    images = torch.cat([batch.images for batch in progress(loader, "reading photos", len(loader))])
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    sample, others = images[:SAMPLE], images[SAMPLE:]
    rows = []
    for ratio in args.ratios:
        adapting = prune(model, NAME, gmacs_ratio=ratio)
        for name, fast in (("adapting", adapting), ("fixed", with_fixed_counts(adapting, sample))):
            found = measured(fast, others) | conditions(torch.float32)
            rows.append({"gmacs_ratio_wanted": ratio, "counts": name} | found)
    write_csv(rows, args.output)
    titles = {"gmacs_ratio_wanted": "wanted", "counts": "", "gmacs_ratio": "GMACs\nratio", "agreement": "", "kl": "KL"}
    show_rows(rows, titles)


@torch.inference_mode()
def measured(fast: PrunedViT, images: Tensor) -> dict[str, Any]:
    """Likeness to the native model, and compute over native."""
    agree, divergence, macs = [], [], []
    for batch in progress(images.split(32), "measuring", -(-len(images) // 32)):
        native, output = fast.game.backbone.native(batch), fast.predict(batch)
        agree.append(output.logits.argmax(1) == native.argmax(1))
        divergence.append(fidelity_loss(native, output.logits))
        whole, own = fast.macs(output)
        macs.append(own / whole)
    return {
        "images": len(images), "gmacs_ratio": float(torch.cat(macs).mean()),
        "agreement": float(torch.cat(agree).float().mean()), "kl": float(torch.cat(divergence).mean()),
    }  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Arguments))
