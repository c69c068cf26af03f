"""The commands that make the paper's figures: `sweep` (Fig. 3) and `finetune` (Fig. 4)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import tyro
from safetensors.torch import save, save_file
from torch import nn

from tokengame.attention import ruled_attention
from tokengame.backbone import Backbone
from tokengame.bench import write_csv
from tokengame.commands import OnImages, report_bad
from tokengame.config import GAME_VERSION, FinetuneConfig, RewardConfig, TrainConfig, merge, require
from tokengame.console import console, named, progress, show_rows, show_table
from tokengame.data import BadImages, checked, plain_views, transform_for
from tokengame.evaluate import calibrate, evaluate, keep_heap
from tokengame.figures import sweep_figure
from tokengame.finetune import Tuner
from tokengame.hub import HuggingFaceStream
from tokengame.images import STREAM, ImageSet, ImageSource, label_images, open_images, split_images
from tokengame.loop import Loop, names_hash, projection
from tokengame.models import preprocessing_of
from tokengame.policy import Policy, dial_for, fingerprint
from tokengame.report import table, verdict
from tokengame.rundir import RunDir, require_writable
from tokengame.runtime import PrunedViT, find_policy, prune
from tokengame.session import Session, calibration_batches, learned
from tokengame.sweep import sweep_row

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
    """How alpha / beta of the reward `share` sets how many tokens live, beside the predicted equilibrium."""

    ratios: tuple[float, ...] = (20.0, 60.0, 100.0, 140.0, 180.0, 240.0)
    """values of alpha / beta; beta is 1"""
    holdout: float = 0.2
    """share of the images held back and measured on"""
    split: str = "train"
    """of a Hugging Face data set"""
    output: Path = Path("sweep")
    """folder for sweep.csv, sweep.png, the policies and their logs; runs found there are gone on with"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig.from_preset("rl4evit")
    )

    def run(self) -> list[dict[str, Any]]:
        """Train a policy a ratio, measure, draw."""
        require(min(self.ratios, default=0) > 0, f"--ratios must be above 0, not {self.ratios}")
        require(self.config.reward.kind == "share", "sweep varies alpha of reward.kind share")
        fixed = (self.config.reward.alpha, self.config.reward.beta) == (RewardConfig().alpha, RewardConfig().beta)
        require(fixed, "sweep sets alpha and beta itself, by --ratios")
        require_writable(self.output / "sweep.csv")
        model, source = self.load()
        learn, held = split_images(source, self.holdout, self.seed)
        rows = []
        for ratio in sorted(self.ratios):
            rows.append(self._point(model, learn, held, ratio))
            write_csv(rows, self.output / "sweep.csv")  # whatever happens later, this much is measured
        (self.output / "sweep.png").write_bytes(sweep_figure(rows))
        show_rows(rows, SWEEP_HEADINGS)
        console.print(f"wrote sweep.csv and sweep.png in {self.output}", markup=False, soft_wrap=True)
        return rows

    def _point(self, model: nn.Module, learn: ImageSource, held: ImageSource, ratio: float) -> dict[str, Any]:
        name = f"alpha {ratio:g}"
        config = merge(self.config, {"reward": {"alpha": ratio, "beta": 1.0}})
        path = self.output / f"alpha{ratio:g}.safetensors"
        session = Session(
            model, self.backbone, config, learn, path, seed=self.seed, device=self.torch_device, resume=None,
            workers=self.workers,
        )  # fmt: skip
        policy = learned(session, partial(named, name))
        loader = plain_views(held, session.preprocessing).loader(32, 0)
        watched = named(name, checked(loader, BadImages(len(held.names))), "measuring", len(loader))
        keep_heap()
        scores = evaluate(prune(model, policy), watched)
        return sweep_row(ratio, 1.0, scores, session.log.metrics()[-max(1, config.updates // 10) :])


@dataclass(kw_only=True)
class Finetune(OnImages):
    """Tune a backbone through a frozen policy; measure it before and after."""

    shared = True
    policy: str
    """policy file, or the name of a shipped one"""
    output: Path = Path("tuned")
    """folder for model.safetensors, policy.safetensors (the same policy, its card calibrated anew for the tuned
    weights) and the log"""
    dial: float | None = None
    """operating point to tune for; default is the policy's recommendation"""
    gmacs_ratio: float | None = None
    """operating point by compute, pruned / native, as the policy's card has it"""
    holdout: float = 0.2
    """share of the images held back and measured on; of a stream its first 1,024"""
    validate: str | None = None
    """other images to measure on, in place of a share held back"""
    split: str = "train"
    """of a Hugging Face data set"""
    resume: bool = False
    """go on from the checkpoint in the log"""
    checkpoint_every: int = 50
    """updates between checkpoints"""
    dry_run: bool = False
    """load everything, do two updates of 32 images a process, say how long all would take and how much
    memory; keep nothing"""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)

    def run(self) -> dict[str, Any]:
        """Measure, tune, calibrate, measure."""
        require(self.dial is None or self.gmacs_ratio is None, "give one of --dial and --gmacs-ratio")
        self.ranks.part_of(self.config.batch_size)
        if not self.dry_run:
            require_writable(self._weights)
        model, source = self.load_to_learn()
        require(not self.config.labels or source.labels is not None, "--labels needs labelled images: see --class-map")
        learn, held = self._split(model, source)
        policy = Policy.load(find_policy(self.policy))
        dial = prune(model, policy, self.dial, gmacs_ratio=self.gmacs_ratio).dial
        if self.dry_run:
            return self._rehearse(model, policy, dial, learn)
        require(0 < dial < 1, f"tuning wants a dial between 0 and 1, not {dial:g}")
        before = self._measured(prune(model, policy, dial), held, model, "before")
        tuner = Tuner(model, policy, dial, self.config, before["gmacs_ratio"], self.ranks)
        loop = self._loop(tuner, dial, self.config, learn, self.output)
        loop.run(progress, "tuning", self.checkpoint_every)
        report_bad(loop.tally)
        if self.ranks.main:
            self._write(policy, tuner.tuned(), held, model, before["gmacs_ratio"])
        self.ranks.wait()
        after = self._measured(prune(tuner.tuned(), Policy.load(self._card_file)), held, model, "after")
        lost = before["drop_pp"]
        return {
            "before": before,
            "after": after,
            "recovered": 1 - after["drop_pp"] / lost if lost is not None and lost > 0 else None,
            "model": str(self._weights),
            "policy": str(self._card_file),
            "images_seen": tuner.images_seen,
            "seconds": loop.seconds,
            "waited_for_images": loop.waited(),
        }

    def _split(self, model: nn.Module, source: ImageSource | HuggingFaceStream) -> tuple[ImageSet, ImageSource]:
        if self.validate is None:
            return split_images(source, self.holdout, self.seed)
        require(not self.validate.startswith(STREAM), f"--validate {self.validate} is a stream: leave out {STREAM}")
        held = cast(ImageSource, open_images(self.validate, "validation", progress))
        label_images(held, self.class_map, Backbone(model).model.num_classes)
        return source, held

    @property
    def _weights(self) -> Path:
        return self.output / "model.safetensors"

    @property
    def _card_file(self) -> Path:
        return self.output / "policy.safetensors"

    def _loop(self, tuner: Tuner, dial: float, config: FinetuneConfig, learn: ImageSet, folder: Path) -> Loop:
        augment = {"scale": (config.crop, 1.0), "auto_augment": config.aa, "re_prob": config.reprob}
        transform = transform_for(preprocessing_of(tuner.teacher), train=True, augment=augment)
        actor = sha256(save(tuner.fast.actor.state_dict())).hexdigest()
        marks = [fingerprint(tuner.fast.game.backbone), actor, dial]
        identity = json.dumps([GAME_VERSION, asdict(config), self.seed, marks, names_hash(learn)])
        log = RunDir(folder / "log", identity, self.ranks.main)
        return Loop(
            tuner, learn, transform, log, asdict(config), updates=config.updates, batch_size=config.batch_size,
            seed=self.seed, resume=self.resume, workers=self.workers, ranks=self.ranks,
        )  # fmt: skip

    def _measured(self, fast: PrunedViT, held: ImageSource, native: nn.Module, when: str) -> dict[str, Any]:
        result = self.measure(fast, held, 32, preprocessing_of(native), reference=native).summary()
        result["dial"] = fast.dial
        show_table(f"{self.backbone} {when} fine-tuning, dial {fast.dial:.3f}", table(result))
        console.print(verdict(result))
        return result

    def _write(self, policy: Policy, tuned: nn.Module, held: ImageSource, native: nn.Module, compute: float) -> None:
        """Weights, and the policy with a card for them; what that promises is measured against the native model.

        The card recommends the dial that gives the tuned model the `compute` (pruned / native) of the untuned one.
        """
        part = self._weights.with_suffix(".part")
        save_file({name: weight.cpu().contiguous() for name, weight in tuned.state_dict().items()}, part)
        os.replace(part, self._weights)
        names = {"fingerprint": fingerprint(Backbone(tuned)), "weights": self._weights.name}
        backbone = policy.card["backbone"] | names
        finetuning = {"config": asdict(self.config), "seed": self.seed, "gmacs_ratio": compute}
        policy = replace(policy, card=policy.card | {"backbone": backbone, "finetuning": finetuning})
        fast = prune(tuned, policy)
        fast.game.backbone.attend = ruled_attention  # the card's figures must not depend on the machine's speed
        batches = calibration_batches(held, preprocessing_of(native), self.seed, self.workers, progress)
        rows = policy.card["calibration"] = calibrate(fast, batches, reference=native)
        ratios = [row["gmacs_ratio"] for row in rows]
        policy.card["dial"] = dial_for(policy.card, gmacs_ratio=min(max(compute, min(ratios)), max(ratios)))
        policy.save(self._card_file)

    def _rehearse(self, model: nn.Module, policy: Policy, dial: float, learn: ImageSet) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            config = replace(self.config, updates=2, batch_size=self.rehearsed(self.config.batch_size))
            loop = self._loop(Tuner(model, policy, dial, config, ranks=self.ranks), dial, config, learn, Path(folder))
            loop.run(progress, "rehearsing")
            result = projection(loop, self.config.updates * self.config.batch_size)
        show_rows([result])
        return result
