"""`calibrate`: what each dial of a policy costs and loses, on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tokengame.cli.common import BATCH, PART, SHARE, OnAnyOutput, report_bad, tuned_weights
from tokengame.files import require_writable
from tokengame.report.console import console, progress, show_rows

CALIBRATION_HEADINGS = {
    "dial": "dial",
    "gmacs_ratio": "compute",
    "keep": "tokens\nkept",
    "agreement": "agree-\nment",
    "kl": "KL",
    "drop_pp": "points\nlost",
    "drop_pp_bound95": "at most\n(95 %)",
    "cosine": "cosine",
    "feature_cosine": "cosine",
    "feature_cosine_q05": "of 95 %\nat least",
    "same_neighbour": "same\nneighbour",
    "distance": "1 - cosine",
    "distance_bound95": "at most\n(95 %)",
}

RULE_SHARE = 0.25
"""of the images, on which thresholds of the starting rule are set where --holdout does not say more"""


@dataclass(kw_only=True)
class Calibrate(OnAnyOutput):
    """Measure every dial of a policy and write it to its card, so that a loss can be guaranteed.

    The images must be none that the policy has learned from; to guarantee a drop of top-1 they must be labelled. A
    guarantee of half a point takes a thousand images at the very least, usually several; of two points, hundreds. A
    guarantee of a mean 1 - cosine, of embeddings or features, takes about 3.5 images over it. It holds for a loss that
    was chosen before looking at the table.
    """

    name: ClassVar[str] = "calibrate"
    examples: ClassVar[str] = (
        "tokengame calibrate --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors "
        "--output calibrated.safetensors\n"
        "tokengame calibrate --backbone vit_tiny_patch16_224 --images val.tar --class-map classes.txt "
        "--policy vit_tiny_patch16_224 --output mine.safetensors\n"
        "tokengame calibrate --backbone vit_small_patch14_dinov2 --images photos/ --policy dinov2.safetensors "
        "--output calibrated.safetensors\n"
        "tokengame calibrate --backbone vit_small_patch16_224 --images val/ --policy rule --output rule.safetensors"
    )

    policy: str
    """policy file, the name of a shipped one, hf:USER/NAME on the Hugging Face hub, or "rule": the starting rule with
    thresholds for 0.7 of the compute, which are set on the images not held back (without --holdout on a quarter of
    them) and calibrated on the others"""
    output: Path
    """the policy file to write; may be the same"""
    batch_size: Annotated[int, BATCH] = 32
    """images a batch"""
    holdout: Annotated[float | None, PART] = None
    """calibrate only on the share that `train` held back with the same --holdout and --seed"""
    cascade_margin: Annotated[float | None, SHARE] = None
    """for the card, instead of the policy's own; 0.15: images whose prediction is uncertain fall back to all tokens"""

    @property
    def inputs(self) -> dict[str, str | None]:
        """All but the policy, which may be written over."""
        return super().inputs | {"--policy": None}

    def run(self) -> list[dict[str, Any]]:
        """Measure every dial and write the policy file; one row per dial."""
        from tokengame.backbones import preprocessing_of, wrap
        from tokengame.data.batches import BadImages, checked, plain_views
        from tokengame.data.datasets import split_images
        from tokengame.measure.evaluate import calibrate
        from tokengame.packed.attention import deterministic_attention
        from tokengame.policies import Policy
        from tokengame.policies.policy import find_policy, fingerprint
        from tokengame.runtime import prune
        from tokengame.runtime.rule import RULE, Rule

        require_writable(self.output)
        model, source = self.load()
        by_rule, others, path = self.policy == RULE, source, self.output
        if self.holdout is not None or by_rule:
            others, source = split_images(source, self.holdout or 1 - RULE_SHARE, self.seed)
        if by_rule:
            tensors = self.for_thresholds(model, others)
            policy = Rule(wrap(model), self.keep_what).with_thresholds(tensors, len(tensors), progress)
        else:
            path = find_policy(self.policy)
            policy = Policy.load(path)
        if self.cascade_margin is not None:
            policy.card["game"] |= {"cascade_margin": self.cascade_margin}
        fast = prune(tuned_weights(policy, path, model), policy)
        kind = self.kind_of(model, policy.card)
        fast.game.attention = deterministic_attention  # the card's figures must not depend on the machine's speed
        tally = BadImages(len(source.names))
        views = plain_views(source, preprocessing_of(model))
        loader = views.loader(self.batch_size, self.workers)
        batches = progress(checked(loader, tally), "calibrating dials", len(loader))
        policy.card["calibration"] = calibrate(fast, batches, reference=model, kind=kind)
        policy.card["keeps"] = kind.name
        report_bad(tally)
        policy.card["backbone"]["fingerprint"] = fingerprint(fast.game.backbone)  # the guarantee is for these weights
        policy.save(self.output)
        rows = policy.card["calibration"]
        show_rows(rows, {name: heading for name, heading in CALIBRATION_HEADINGS.items() if name in rows[0]})
        console.print(f"wrote {self.output}", markup=False, soft_wrap=True)
        return rows
