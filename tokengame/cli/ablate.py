"""`ablate`: training without each of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from tokengame.cli.common import PART, OnImages, ratio_headings
from tokengame.cli.hints import about
from tokengame.config import TrainConfig, require
from tokengame.files import require_writable, write_csv
from tokengame.ranges import Range
from tokengame.report.console import named, progress, show_rows

if TYPE_CHECKING:
    from torch import nn

    from tokengame.data.batches import Batch
    from tokengame.data.datasets import ImageSource
    from tokengame.policies import Policy


@dataclass(kw_only=True)
class Ablate(OnImages):
    """Train without each part of learning, over several seeds, and measure on the same held-back images."""

    name: ClassVar[str] = "ablate"
    takes_preset: ClassVar[bool] = True
    first: ClassVar[tuple[str, ...]] = ("output", "weights", "class_map", "seeds", "holdout", "updates", "preset")
    examples: ClassVar[str] = (
        "tokengame ablate --backbone vit_tiny_patch16_224 --images train/ --updates 100 --seeds 3 --output ablations"
    )

    rows: Literal["without", "walk"] = "without"
    """without: the preset without each of its parts. walk: from --preset rl4evit-code to tokengame, a change a row, all
    of as many games"""
    seeds: Annotated[int, Range(1, 1_000, whole=True)] = 3
    """runs of each; the first has the seed given by --seed"""
    holdout: Annotated[float, PART] = 0.3
    """share of the images held back and measured on"""
    split: str = "train"
    """of a Hugging Face data set"""
    output: Path = Path("ablations")
    """folder for ablations.csv, the policies and their logs; runs found there are continued"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig.from_preset("tokengame")
    )

    def check(self) -> None:
        """Also: a walk starts where it says."""
        super().check()
        starts = self.rows != "walk" or self.config.preset == "rl4evit-code"
        require(starts, f"--rows walk starts from --preset rl4evit-code, not {self.config.preset}")

    def run(self) -> list[dict[str, Any]]:
        """Train and measure every variant with every seed; one row per variant."""
        import torch

        from tokengame.data.datasets import split_images
        from tokengame.measure.ablate import AS_IT_IS, across_seeds, by_rules, by_starting_rule, quality, variants, walk
        from tokengame.measure.conditions import conditions
        from tokengame.runtime import prune

        require_writable(self.output / "ablations.csv")
        model, source = self.load()
        learn, held = split_images(source, self.holdout, self.seed)
        start = "nothing learned: the starting rule"
        measured = partial(self._batches, model, held, start)
        settings = {"without": variants, "walk": walk}[self.rows](self.config)
        *_, last = settings.values()  # of a walk the game that it ends with
        found = {start: [by_starting_rule(model, last.game, self.for_thresholds(model, learn), measured)]}
        for number, (name, config) in enumerate(settings.items()):
            for seed in range(self.seed, self.seed + self.seeds):
                policy = self._policy(model, config, learn, f"{number}_seed{seed}", seed)
                batches = partial(self._batches, model, held, name)
                found.setdefault(name, []).append(quality(model, policy, batches))
                if name == AS_IT_IS:
                    for rule, row in by_rules(prune(model, policy), batches, self._dials()).items():
                        found.setdefault(rule, []).append(row)
            rows = [
                {"ablation": name, **across_seeds(results), **conditions(torch.float32, self.torch_device)}
                for name, results in found.items()
            ]
            write_csv(rows, self.output / "ablations.csv")  # keep what is measured, whatever happens later
        show_rows(rows, {"ablation": self.rows, **ratio_headings(rows[0])})
        return rows

    def _policy(self, model: nn.Module, config: TrainConfig, learn: ImageSource, name: str, seed: int) -> Policy:
        from tokengame.learning.run import TrainingRun, trained_policy

        path, device = self.output / f"{name}.safetensors", self.torch_device
        training = TrainingRun(
            model, self.backbone, config, learn, path, seed=seed, device=device, resume=None, workers=self.workers,
            about=about(self),
        )  # fmt: skip
        return trained_policy(training, partial(named, name))

    @staticmethod
    def _dials() -> tuple[float, ...]:
        from tokengame.measure.evaluate import CALIBRATION_DIALS

        return CALIBRATION_DIALS[::2]

    def _batches(self, model: nn.Module, source: ImageSource, name: str) -> Iterator[Batch]:
        from tokengame.backbones import preprocessing_of
        from tokengame.data.batches import BadImages, checked, plain_views

        views = plain_views(source, preprocessing_of(model))
        loader = views.loader(32, self.workers)
        yield from progress(checked(loader, BadImages(len(source.names))), f"measuring {name}", len(loader))
