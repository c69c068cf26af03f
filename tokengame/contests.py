"""The commands that set things against each other: `bench` on the clock, `compare` methods, `ablate` their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from tokengame.ablate import across_seeds, by_rules, quality, variants
from tokengame.backbone import Backbone
from tokengame.bench import Plan, bench, csv_path, write_csv
from tokengame.commands import Common, OnImages, report_bad, weights_of
from tokengame.compare import compare, dynamic_entries, peers, policy_entries, qualities, speeds
from tokengame.config import GameConfig, TrainConfig, require
from tokengame.console import console, named, progress, show_rows, steps
from tokengame.data import BadImages, Batch, checked, plain_views, transform_for
from tokengame.dynamicvit import DynamicViT, train_dynamicvit
from tokengame.evaluate import CALIBRATION_DIALS, RATIOS, keep_heap
from tokengame.feed import Feed
from tokengame.figures import frontier_figure
from tokengame.images import ImageSource, split_images
from tokengame.models import EMBEDDED, load_model, preprocessing_of, untrained
from tokengame.policy import Policy
from tokengame.report import markdown, paper_rows
from tokengame.rundir import require_writable
from tokengame.runtime import find_policy, prune
from tokengame.session import Session, learned

BENCH_HEADINGS = {
    "dtype": "format",
    "batch_size": "batch",
    "native": "native\nis",
    "images_per_second_native": "native\nimg/s",
    "images_per_second_pruned": "pruned\nimg/s",
    "speedup": "speed-\nup",
    "gmacs_speedup": "by\nGMACs",
    "efficiency": "effi-\nciency",
    "verdict": "verdict",
}


@dataclass(kw_only=True)
class Bench(Common):
    """Honest timing, native and pruned interleaved in one run."""

    backbone: str
    """timm model name, or "fashion"; random weights serve, for decisions are forced"""
    weights: str | None = None
    """local checkpoint"""
    keep: tuple[float, ...] = (0.7, 0.49, 0.34)
    """forced shares of tokens alive after each stage, spread over images"""
    stages: tuple[int, ...] = ()
    """blocks at which tokens leave; empty: evenly spaced"""
    transition: Literal["drop", "merge"] = "drop"
    """what becomes of pruned tokens"""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """images a batch"""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """what both models compute in"""
    seconds: float = 20.0
    """time spent on each row, after warm-up"""
    compiled: bool = True
    """also time what torch.compile makes of both models; of each the fastest counts"""
    tome: bool = False
    """also time ToMe at equal GMACs: with fused attention, with the game's kernels, and compiled"""
    output: Path = Path("results")
    """folder for the CSV, whose name holds the conditions"""

    def run(self) -> list[dict[str, Any]]:
        """Time."""
        require(min(self.batch_sizes, default=0) >= 1, f"--batch-sizes must be at least 1, not {self.batch_sizes}")
        require(bool(self.dtypes), "--dtypes must name at least one")
        embedded = self.weights is not None or self.backbone == EMBEDDED
        model = load_model(self.backbone, self.weights) if embedded else untrained(self.backbone)
        plan = Plan(
            GameConfig(stages=self.stages, stage_count=len(self.keep), transition=self.transition), self.keep,
            self.batch_sizes, tuple(getattr(torch, d) for d in self.dtypes), self.seconds, self.seed, self.compiled,
            self.tome, keep_heap(),
        )  # fmt: skip
        model = self.place(model)
        backbone = Backbone(model)
        path = csv_path(self.output, self.backbone, plan, plan.game.blocks(backbone.depth), backbone.device)
        require_writable(path)
        rows: list[dict[str, Any]] = []
        with steps("timing", len(self.dtypes) * len(self.batch_sizes)) as next_step:
            for row in bench(model, self.backbone, plan, next_step):
                rows.append(row)
                write_csv(rows, path)  # whatever happens later, this much is measured
        show_rows(rows, BENCH_HEADINGS | ({"speedup_over_tome": "over\nToMe"} if self.tome else {}))
        show_rows([{"format": row["dtype"], "batch": row["batch_size"]} | row["time_shares"] for row in rows])
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
        return rows


AT_RATIOS = {
    f"{name}_{ratio}": f"{label}\nat {ratio}"
    for ratio in RATIOS
    for name, label in (("agreement", "agree"), ("kl", "KL"))
}
ABLATE_HEADINGS = {"ablation": "without", **AT_RATIOS}


@dataclass(kw_only=True)
class Ablate(OnImages):
    """What each part of learning is worth: trained without it, over several seeds, same held-back images."""

    seeds: int = 3
    """runs of each; the first has the seed given by --seed"""
    holdout: float = 0.3
    """share of the images held back and measured on"""
    split: str = "train"
    """of a Hugging Face data set"""
    output: Path = Path("ablations")
    """folder for ablations.csv, the policies and their logs; runs found there are gone on with"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig.from_preset("tokengame")
    )

    def run(self) -> list[dict[str, Any]]:
        """Train all, measure all."""
        require(self.seeds >= 1, "--seeds must be at least 1")
        require_writable(self.output / "ablations.csv")
        model, source = self.load()
        learn, held = split_images(source, self.holdout, self.seed)
        found: dict[str, list[dict[str, float]]] = {}
        for number, (name, config) in enumerate(variants(self.config).items()):
            for seed in range(self.seed, self.seed + self.seeds):
                policy = self._policy(model, config, learn, f"{number}_seed{seed}", seed)
                batches = partial(self._batches, model, held, name)
                found.setdefault(name, []).append(quality(model, policy, batches))
                if not number:
                    for rule, row in by_rules(prune(model, policy), batches, self._dials()).items():
                        found.setdefault(rule, []).append(row)
            rows = [{"ablation": name, **across_seeds(results)} for name, results in found.items()]
            write_csv(rows, self.output / "ablations.csv")  # whatever happens later, this much is measured
        show_rows(rows, ABLATE_HEADINGS)
        return rows

    def _policy(self, model: nn.Module, config: TrainConfig, learn: ImageSource, name: str, seed: int) -> Policy:
        path, device = self.output / f"{name}.safetensors", self.torch_device
        session = Session(
            model, self.backbone, config, learn, path, seed=seed, device=device, resume=None, workers=self.workers
        )
        return learned(session, partial(named, name))

    @staticmethod
    def _dials() -> tuple[float, ...]:
        return CALIBRATION_DIALS[::2]

    def _batches(self, model: nn.Module, source: ImageSource, name: str) -> Iterator[Batch]:
        views = plain_views(source, preprocessing_of(model))
        loader = views.loader(32, self.workers)
        yield from progress(checked(loader, BadImages(len(source.names))), f"measuring {name}", len(loader))


COMPARE_HEADINGS = {
    "method": "method",
    "setting": "setting",
    "gmacs_ratio": "compute",
    "agreement": "agree-\nment",
    "kl": "KL",
    "drop_pp": "points\nlost",
    "speedup": "speed-\nup",
}


@dataclass(kw_only=True)
class Compare(OnImages):
    """Every method over its range of settings: same native model, images, number format, kernels and timing."""

    policies: tuple[str, ...] = ()
    """policy files or names of shipped ones; each is run over its dials, one made by `finetune` on the tuned weights
    beside it"""
    dials: tuple[float, ...] = (0.05, 0.12, 0.27, 0.38, 0.5, 0.62, 0.73, 0.82)
    """of the policies"""
    budgets: bool = False
    """also let attention and chance choose as many tokens in each image as each policy did: not timed"""
    timing: bool = True
    """also time the methods, one after the other"""
    holdout: float | None = None
    """measure only on the share that `train` held back with the same --holdout and --seed"""
    dynamicvit_updates: int = 0
    """train DynamicViT's predictor on the images not held back for so many updates; 0 leaves it out"""
    batch_size: int = 32
    """images a batch"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what all models compute in"""
    output: Path = Path("compare")
    """folder for compare.csv, table.csv and table.md (the paper's layout), qualities.csv (at the same compute),
    speeds.csv (at the same agreement), frontier.png"""

    def run(self) -> list[dict[str, Any]]:
        """Train what must be trained, measure, draw."""
        require_writable(self.output / "compare.csv")
        require(self.batch_size >= 1, f"--batch-size must be at least 1, not {self.batch_size}")
        needs = "DynamicViT must be trained on images that it is not measured on"
        require(not self.dynamicvit_updates or self.holdout is not None, f"{needs}: give --holdout")
        policies = [Policy.load(find_policy(path)) for path in self.policies]
        names = [
            Path(path).stem + ", fine-tuned" * _is_tuned(p) for path, p in zip(self.policies, policies, strict=True)
        ]
        require(len(set(names)) == len(names), f"policies are told apart by file name, and these are not: {names}")
        model, source = self.load()
        learn, held = (source, source) if self.holdout is None else split_images(source, self.holdout, self.seed)
        model.requires_grad_(False)
        dynamic = self._train(model, learn) if self.dynamicvit_updates else None
        model.to(getattr(torch, self.dtype))
        entries = peers(model) + (dynamic_entries(model, dynamic) if dynamic is not None else [])
        for name, policy, path in zip(names, policies, self.policies, strict=True):
            own = weights_of(policy, Path(path), model, self.backbone)
            entries += policy_entries(own, name, policy, self.dials, self.budgets)
        for entry in entries:
            entry.is_timed &= self.timing
        tally = BadImages(len(held.names))
        keep_heap()
        watched = lambda timed: progress(timed, "timing", len(timed))  # noqa: E731
        rows = compare(model, entries, self._batches(model, held, tally), watched)
        report_bad(tally)
        self._write(rows)
        return rows

    def _batches(self, model: nn.Module, source: ImageSource, tally: BadImages) -> Iterator[Batch]:
        """In random order, so that the first ones, which speed is measured on, are like all."""
        order = torch.randperm(len(source.names), generator=torch.Generator().manual_seed(self.seed)).tolist()
        loader = plain_views(source, preprocessing_of(model), order).loader(self.batch_size, self.workers)
        yield from progress(checked(loader, tally), "comparing", len(loader))

    def _train(self, model: nn.Module, source: ImageSource) -> DynamicViT:
        count = self.dynamicvit_updates
        transform = transform_for(preprocessing_of(model), train=True)
        feed = Feed(source, transform, self.seed, self.batch_size, count)
        batches = checked(feed.loader(workers=self.workers), BadImages(feed.total))
        return train_dynamicvit(model, progress(batches, "training DynamicViT", count), count, seed=self.seed)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_csv(rows, self.output / "compare.csv")
        quality, table, paper = qualities(rows), speeds(rows), paper_rows(rows)
        write_csv(paper, self.output / "table.csv")
        (self.output / "table.md").write_text(markdown(paper))
        write_csv(quality, self.output / "qualities.csv")
        (self.output / "frontier.png").write_bytes(frontier_figure(rows, [Path(path).stem for path in self.policies]))
        blank = dict.fromkeys(COMPARE_HEADINGS, "")
        show_rows([blank | row for row in rows], COMPARE_HEADINGS)
        show_rows(quality, {"method": "method", **AT_RATIOS})
        files = ["compare.csv", "table.csv", "table.md", "qualities.csv", "frontier.png"]
        (self.output / "speeds.csv").unlink(missing_ok=True)  # of another run
        if self.timing:
            write_csv(table, self.output / "speeds.csv")
            show_rows(table)
            files.append("speeds.csv")
        console.print(f"wrote {', '.join(files)} in {self.output}", markup=False, soft_wrap=True)


def _is_tuned(policy: Policy) -> bool:
    return "weights" in policy.card["backbone"]
