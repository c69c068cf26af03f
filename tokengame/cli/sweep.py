"""`sweep`: how alpha / beta of the reward `share` sets how many tokens are kept (the paper's Figure 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from tokengame.cli.common import PART, OnImages
from tokengame.cli.hints import about
from tokengame.config import TrainConfig, require, with_overrides
from tokengame.files import require_writable, write_csv, write_whole
from tokengame.ranges import Range
from tokengame.report.console import console, named, show_rows

if TYPE_CHECKING:
    from torch import nn

    from tokengame.data.datasets import ImageSource

SWEEP_HEADINGS = {
    "alpha_over_beta": "alpha\n/ beta",
    "keep": "tokens\nkept",
    "keep_sampled": "in sampled\ngames",
    "keep_predicted": "pre-\ndicted",
    "earned": "earned\n/ cost",
    "gmacs_ratio": "compute",
    "top1_pruned": "top-1",
    "reading": "reading",
}


@dataclass(kw_only=True)
class Sweep(OnImages):
    """How alpha / beta of the reward `share` sets how many tokens are kept, beside the predicted equilibrium."""

    name: ClassVar[str] = "sweep"
    first: ClassVar[tuple[str, ...]] = ("output", "weights", "class_map", "ratios", "holdout", "updates", "preset")
    takes_preset: ClassVar[bool] = True
    examples: ClassVar[str] = (
        "tokengame sweep --backbone fashion --images fashion\n"
        "tokengame sweep --backbone deit_small_patch16_224 --images train/ --ratios 40 80 120 160 --updates 1000"
    )

    ratios: Annotated[tuple[float, ...], Range(0, 1e6, above=True)] = (20.0, 60.0, 100.0, 140.0, 180.0, 240.0)
    """values of alpha / beta; beta is 1"""
    holdout: Annotated[float, PART] = 0.2
    """share of the images held back and measured on"""
    split: str = "train"
    """of a Hugging Face data set"""
    output: Path = Path("sweep")
    """folder for sweep.csv, sweep.png, the policies and their logs; runs found there are continued"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig.from_preset("rl4evit")
    )

    def check(self) -> None:
        """Also: the reward is one that a ratio sets, and nothing else sets."""
        super().check()
        require(self.config.reward.kind == "share", "sweep varies alpha of reward.kind share")
        given, preset = self.config.reward, TrainConfig.from_preset(self.config.preset).reward
        fixed = (given.alpha, given.beta) == (preset.alpha, preset.beta)
        require(fixed, "sweep sets alpha and beta itself, by --ratios")

    def run(self) -> list[dict[str, Any]]:
        """Train and measure a policy for every ratio, draw the figure; one row per ratio."""
        from tokengame.data.datasets import split_images
        from tokengame.report.figures import sweep_figure

        require_writable(self.output / "sweep.csv", self.output / "sweep.png")
        model, source = self.load()
        learn, held = split_images(source, self.holdout, self.seed)
        rows = []
        for ratio in sorted(self.ratios):
            rows.append(self._point(model, learn, held, ratio))
            write_csv(rows, self.output / "sweep.csv")  # keep what is measured, whatever happens later
        write_whole(self.output / "sweep.png", sweep_figure(rows))
        show_rows(rows, SWEEP_HEADINGS)
        console.print(f"wrote sweep.csv and sweep.png in {self.output}", markup=False, soft_wrap=True)
        return rows

    def _point(self, model: nn.Module, learn: ImageSource, held: ImageSource, ratio: float) -> dict[str, Any]:
        import torch

        from tokengame.data.batches import BadImages, checked, plain_views
        from tokengame.learning.run import TrainingRun, trained_policy
        from tokengame.measure.conditions import conditions
        from tokengame.measure.evaluate import evaluate, keep_freed_memory
        from tokengame.measure.sweep import sweep_row
        from tokengame.runtime import prune

        name = f"alpha {ratio:g}"
        config = with_overrides(self.config, {"reward": {"alpha": ratio, "beta": 1.0}})
        path = self.output / f"alpha{ratio:g}.safetensors"
        training = TrainingRun(
            model, self.backbone, config, learn, path, seed=self.seed, device=self.torch_device, resume=None,
            workers=self.workers, about=about(self),
        )  # fmt: skip
        policy = trained_policy(training, partial(named, name))
        loader = plain_views(held, training.preprocessing).loader(32, 0)
        shown = named(name, checked(loader, BadImages(len(held.names))), "measuring", len(loader))
        keep_freed_memory()
        scores = evaluate(prune(model, policy), shown)
        row = sweep_row(ratio, 1.0, scores, training.log.metrics()[-max(1, config.updates // 10) :])
        return row | conditions(torch.float32, self.torch_device)
