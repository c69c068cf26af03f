"""`eval`: native beside pruned on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tokengame.cli.common import BATCH, COMPUTE, PART, SHARE, OnAnyOutput, prune_by_name, show_rivals
from tokengame.config import require
from tokengame.ranges import Range
from tokengame.report.console import console, show_table


@dataclass(kw_only=True)
class Eval(OnAnyOutput):
    """Measure the pruned model beside the native one on the same images."""

    name: ClassVar[str] = "eval"
    first: ClassVar[tuple[str, ...]] = ("weights", "class_map", "dial", "gmacs_ratio", "max_drop", "keep_what")
    examples: ClassVar[str] = (
        "tokengame eval --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors\n"
        "tokengame eval --backbone vit_small_patch16_224 --images val/ --policy rule --gmacs-ratio 0.6\n"
        "tokengame eval --backbone vit_tiny_patch16_224 --images val.tar --policy calibrated.safetensors --max-drop 1\n"
        "tokengame eval --backbone my_vit/ --images val/ --policy policy.safetensors\n"
        "tokengame eval --backbone vit_small_patch14_dinov2 --images photos/ --policy dinov2.safetensors "
        "--keep-what features"
    )

    distributed = True
    policy: str
    """policy file, the name of a shipped one, hf:USER/NAME on the Hugging Face hub, or "rule": the starting rule, of
    which nothing is learned"""
    dial: Annotated[float | None, SHARE] = None
    """operating point: 0 keeps all tokens, 0.5 is the policy's own choice, 1 prunes most"""
    gmacs_ratio: Annotated[float | None, COMPUTE] = None
    """operating point: pruned / native compute, by the policy's calibration; the rule needs none (0.7)"""
    max_drop: Annotated[float | None, Range(0, 100)] = None
    """operating point: the hardest at which calibration guarantees, with 95 % confidence, to lose at most so many
    points of top-1"""
    max_distance: Annotated[float | None, SHARE] = None
    """operating point, of embeddings and features: the hardest at which calibration guarantees, with 95 % confidence, a
    mean 1 - cosine of at most so much"""
    batch_size: Annotated[int, BATCH] = 32
    """images a batch, in the timing too"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what both models compute in"""
    holdout: Annotated[float | None, PART] = None
    """measure only on the share that `train` held back with the same --holdout and --seed"""
    rivals: bool = False
    """also time the native model compiled, in ONNX Runtime and OpenVINO, and in int8, on the same images; the speed-up
    is over the fastest of the same precision (pip install 'tokengame[engines]')"""

    def check(self) -> None:
        """Also: there is one operating point."""
        super().check()
        points = (self.dial, self.gmacs_ratio, self.max_drop, self.max_distance)
        one = "give one of --dial, --gmacs-ratio, --max-drop and --max-distance"
        require(sum(point is not None for point in points) <= 1, one)

    def run(self) -> dict[str, Any]:
        """Measure both models on all images."""
        require(not self.rivals or self.processes.size == 1, "--rivals times in one process, without a launcher")
        import torch

        from tokengame.backbones import preprocessing_of
        from tokengame.data.datasets import split_images
        from tokengame.measure.against import RivalRun
        from tokengame.measure.conditions import conditions, engines
        from tokengame.report.html import table, verdict

        targets = {"gmacs_ratio": self.gmacs_ratio, "max_drop": self.max_drop, "max_distance": self.max_distance}
        model, source = self.load()
        if self.holdout is not None:
            source = split_images(source, self.holdout, self.seed)[1]
        model = model.to(getattr(torch, self.dtype))
        fast = prune_by_name(model, self.policy, self.dial, keep_what=self.keep_what, **targets)
        kind = self.kind_of(model, fast.card)
        rivals = RivalRun(min(self.batch_size, len(source.names)), self.note) if self.rivals else None
        scores = self.measure(fast, source, self.batch_size, preprocessing_of(model), model, kind, rivals)
        result = scores.summary() | ({} if rivals is None else rivals.summary())
        result |= {"dial": fast.dial, "dtype": self.dtype} | conditions(fast.game.backbone.dtype, self.torch_device)
        show_table(f"{self.backbone}, dial {fast.dial:.3f}", table(result))
        if rivals is not None:
            result |= engines()
            show_rivals(result["rivals"])
        console.print(verdict(result))
        return result
