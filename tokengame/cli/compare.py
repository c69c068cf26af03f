"""`compare`: every method over its range of settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tokengame.cli.common import BATCH, PART, SHARE, OnAnyOutput, ratio_headings, report_bad, tuned_weights
from tokengame.config import require
from tokengame.files import require_writable, write_csv, write_whole, writing
from tokengame.ranges import Range
from tokengame.report.console import console, progress, show_rows

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from tokengame.baselines.dynamicvit import DynamicViT
    from tokengame.data.datasets import ImageSource
    from tokengame.policies import Policy

COMPARE_HEADINGS = {
    "method": "method",
    "setting": "setting",
    "gmacs_ratio": "compute",
    "agreement": "agree-\nment",
    "kl": "KL",
    "drop_pp": "points\nlost",
    "cosine": "cosine",
    "feature_cosine": "cosine",
    "same_neighbour": "same\nneighbour",
    "distance": "1 - cosine",
    "speedup": "speed-\nup",
}
FILES = ("compare.csv", "table.csv", "table.md", "qualities.csv", "frontier.png", "speeds.csv")


@dataclass(kw_only=True)
class Compare(OnAnyOutput):
    """Every method over its range of settings: same native model, images, number format, kernels and timing."""

    name: ClassVar[str] = "compare"
    first: ClassVar[tuple[str, ...]] = ("policies", "output", "weights", "class_map", "holdout")
    examples: ClassVar[str] = (
        "tokengame compare --backbone vit_small_patch16_224 --images val/ --policies policy.safetensors\n"
        "tokengame compare --backbone vit_tiny_patch16_224 --images images.tar --class-map classes.txt --holdout 0.3 "
        "--policies mine.safetensors rl4evit.safetensors --dynamicvit-updates 200 --dtype bfloat16"
    )

    policies: tuple[str, ...] = ()
    """policy files, names of shipped ones or hf:USER/NAME; each is run over its dials, one made by `finetune` on the
    tuned weights beside it. "rule", the starting rule, is a row of every table: with a budget for each image, and with
    --holdout also with thresholds that are set on the images not held back"""
    dials: Annotated[tuple[float, ...], SHARE] = (0.05, 0.12, 0.27, 0.38, 0.5, 0.62, 0.73, 0.82)
    """of the policies"""
    baselines: tuple[str, ...] = ()
    """names of the baselines to run, as the tables have them ("ToMe" "EViT" "rule"); none: all"""
    budgets: bool = False
    """also let attention and random choose as many tokens in each image as each policy keeps: not timed"""
    timing: bool = True
    """also time the methods, one after the other"""
    holdout: Annotated[float | None, PART] = None
    """measure only on the share that `train` held back with the same --holdout and --seed"""
    dynamicvit_updates: Annotated[int, Range(0, 10**8, whole=True)] = 0
    """train DynamicViT's predictor on the images not held back for so many updates; 0 leaves it out"""
    batch_size: Annotated[int, BATCH] = 32
    """images a batch"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what all models compute in"""
    output: Path = Path("compare")
    """folder for compare.csv, table.csv and table.md (the paper's layout), qualities.csv (at the same compute),
    speeds.csv (at the same agreement), frontier.png"""

    def check(self) -> None:
        """Also: DynamicViT has images to learn from."""
        super().check()
        needs = "--dynamicvit-updates trains DynamicViT on images that it is not measured on"
        require(not self.dynamicvit_updates or self.holdout is not None, f"{needs}: give --holdout")

    def run(self) -> list[dict[str, Any]]:
        """Measure all methods, time them, write tables and the picture; one row per method and setting."""
        import torch

        from tokengame.data.batches import BadImages, checked
        from tokengame.data.datasets import split_images
        from tokengame.measure.compare import (
            baseline_entries,
            compare,
            dynamicvit_entries,
            policy_entries,
            rule_entries,
        )  # fmt: skip
        from tokengame.measure.conditions import conditions
        from tokengame.measure.evaluate import keep_freed_memory
        from tokengame.policies import Policy
        from tokengame.policies.policy import find_policy
        from tokengame.runtime.rule import RULE

        require_writable(*(self.output / name for name in FILES))
        paths = [path for path in self.policies if path != RULE]  # which is measured anyway
        files = [find_policy(path) for path in paths]
        policies = [Policy.load(file) for file in files]
        names = [Path(path).stem + ", fine-tuned" * _is_tuned(p) for path, p in zip(paths, policies, strict=True)]
        require(len(set(names)) == len(names), f"policies are told apart by file name, and these are not: {names}")
        model, source = self.load()
        learn, held = (source, source) if self.holdout is None else split_images(source, self.holdout, self.seed)
        model.requires_grad_(False)
        dynamic = self._train(model, learn) if self.dynamicvit_updates else None
        model.to(getattr(torch, self.dtype))
        entries = baseline_entries(model, self.baselines) + (
            dynamicvit_entries(model, dynamic) if dynamic is not None else []
        )
        if self.holdout is not None:
            entries += rule_entries(model, self.for_thresholds(model, learn), progress)
        for name, policy, file in zip(names, policies, files, strict=True):
            own = tuned_weights(policy, file, model)
            entries += policy_entries(own, name, policy, self.dials, self.budgets)
        for entry in entries:
            entry.is_timed &= self.timing
        tally = BadImages(len(held.names))
        keep_freed_memory()
        loader = self._loader(model, held)
        circumstances = conditions(getattr(torch, self.dtype), self.torch_device)

        def keep(rows: list[dict[str, Any]]) -> None:
            write_csv([row | circumstances for row in rows], self.output / "compare.csv")

        rows = compare(model, entries, checked(loader, tally), len(loader), progress, keep, self.kind_of(model))
        report_bad(tally)
        self._write([row | circumstances for row in rows])
        return rows

    def _loader(self, model: nn.Module, source: ImageSource) -> DataLoader:
        """In random order, so that the first batches, on which speed is measured, are like all."""
        import torch

        from tokengame.backbones import preprocessing_of
        from tokengame.data.batches import plain_views

        order = torch.randperm(len(source.names), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return plain_views(source, preprocessing_of(model), order).loader(self.batch_size, self.workers)

    def _train(self, model: nn.Module, source: ImageSource) -> DynamicViT:
        from tokengame.backbones import preprocessing_of
        from tokengame.baselines.dynamicvit import train_dynamicvit
        from tokengame.data.batches import BadImages, checked
        from tokengame.data.loader import TrainingLoader
        from tokengame.data.transforms import transform_for

        count = self.dynamicvit_updates
        transform = transform_for(preprocessing_of(model), train=True)
        loader = TrainingLoader(source, transform, self.seed, self.batch_size, count)
        batches = checked(loader.loader(workers=self.workers), BadImages(loader.total))
        return train_dynamicvit(model, progress(batches, "training DynamicViT", count), count, seed=self.seed)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        from tokengame.measure.compare import qualities, speeds
        from tokengame.report.figures import frontier_figure
        from tokengame.report.html import markdown, paper_rows

        write_csv(rows, self.output / "compare.csv")
        quality, table, paper = qualities(rows), speeds(rows), paper_rows(rows)
        write_csv(paper, self.output / "table.csv")
        write_whole(self.output / "table.md", markdown(paper))
        write_csv(quality, self.output / "qualities.csv")
        figure = frontier_figure(rows, [Path(path).stem for path in self.policies])
        write_whole(self.output / "frontier.png", figure)
        headings = {k: v for k, v in COMPARE_HEADINGS.items() if any(k in row for row in rows)}
        show_rows([dict.fromkeys(headings, "") | row for row in rows], headings)
        show_rows(quality, {"method": "method", **ratio_headings(quality[0])})
        files = list(FILES[:-1])
        with writing(self.output / "speeds.csv"):
            (self.output / "speeds.csv").unlink(missing_ok=True)  # of another run
        if self.timing:
            write_csv(table, self.output / "speeds.csv")
            show_rows(table)
            files.append("speeds.csv")
        console.print(f"wrote {', '.join(files)} in {self.output}", markup=False, soft_wrap=True)


def _is_tuned(policy: Policy) -> bool:
    return "weights" in policy.card["backbone"]
