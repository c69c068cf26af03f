"""A training run: data order, progress, metrics, checkpoints, calibration, the policy file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tokengame.backbones import preprocessing_of
from tokengame.config import GAME_VERSION, FinetuneConfig, TrainConfig
from tokengame.data.batches import BadImages, Batch, checked, plain_views
from tokengame.data.datasets import ImageSet, ImageSource
from tokengame.data.transforms import transform_for
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError
from tokengame.files import Progress, require_writable, silent
from tokengame.learning.checkpoint import RunFolder, require_new
from tokengame.learning.loop import Loop, names_hash
from tokengame.learning.trainer import Trainer
from tokengame.measure.conditions import conditions
from tokengame.measure.evaluate import calibrate
from tokengame.measure.kinds import kind_of
from tokengame.packed.attention import deterministic_attention
from tokengame.policies.policy import FORMAT, Policy, dial_for, fingerprint
from tokengame.runtime import PrunedViT, prune

CALIBRATION_BATCHES = 8
"""batches on which biases are calibrated at the end of training"""


def log_of(output: Path) -> Path:
    """The folder beside a policy file for metrics and checkpoints of its run."""
    return output.with_name(output.stem + "_log")


class TrainingRun:
    """One run of `train`, with its log beside the policy file (see `RunFolder`).

    Args:
        model: of a supported family, on its device.
        name: the backbone's name, for the card.
        config: settings.
        images: to learn from; the policy learns from no others.
        output: the policy file.
        seed: of everything random.
        resume: continue from the checkpoint in the log, also with more `config.updates`; None: if there is one.
        overwrite: replace what an earlier run left; without it, that is refused.
        workers: processes that decode images.
        processes: those that train together, each with a run of its own.
        about: what else `config.json` is to say of the run, e.g. where the images are.

    Raises:
        TokenGameError: an earlier run is there that is neither to be continued nor replaced, or does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: TrainConfig,
        images: ImageSet,
        output: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
        resume: bool | None = False,
        overwrite: bool = False,
        workers: int = 1,
        processes: Processes | None = None,
        about: dict[str, Any] | None = None,
    ):
        self.model, self.name, self.config, self.images = model, name, config, images
        self.output, self.seed, self.workers = output, seed, workers
        self.processes = processes or Processes()
        self.processes.local_batch(config.batch_size)
        require_writable(output)
        if self.processes.main and not overwrite:
            self._require_new(resume)
        if config.reward.kind != "fidelity" and images.labels is None:
            raise TokenGameError(
                f"reward {config.reward.kind!r} needs labels: give class folders and --class-map, or use fidelity"
            )
        if config.reward.target_drop is not None and images.labels is None:
            raise TokenGameError("reward.target_drop needs labelled images; without labels use reward.target_kl")
        self.trainer = Trainer(model, config, seed, device, self.processes)
        self.preprocessing = preprocessing_of(model)
        self.log = RunFolder(log_of(output), self.identity, self.processes.main)
        description = description_of(name, config, seed, device, about)
        self.loop = Loop(
            self.trainer, images, transform_for(self.preprocessing, train=True), self.log, description,
            updates=config.updates, batch_size=config.batch_size, seed=seed, resume=resume, workers=workers,
            processes=self.processes,
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """Settings, seed, weights, images and the rules of the game: what a resumed run must share."""
        weights, settings = fingerprint(self.trainer.backbone), lasting(self.config)
        return json.dumps([FORMAT, GAME_VERSION, settings, self.seed, weights, names_hash(self.images)])

    def _require_new(self, resume: bool | None) -> None:
        if resume is None and not (log_of(self.output) / "checkpoint.pt").is_file() and self.output.is_file():
            raise TokenGameError(
                f"{self.output} is there but not the log of its run, from which it could go on; choose another --output"
            )
        if resume is False:
            require_new(log_of(self.output), self.output)

    def run(self, progress: Progress = silent, checkpoint_every: int = 50) -> None:
        """Train to the end; see `Loop.run` and `Trainer.calibrate_biases`."""
        with self.log.lock():
            self.loop.run(progress, checkpoint_every=checkpoint_every)
            if not self.trainer.calibrated:
                batches = progress(self.loop.more(CALIBRATION_BATCHES), "calibrating biases", CALIBRATION_BATCHES)
                self.trainer.calibrate_biases(batch.images for batch in batches)
                self.loop.save()

    def policy(self, calibration: list[dict[str, Any]], dial: float = 0.5) -> Policy:
        """The learned policy with its card."""
        config, backbone = asdict(self.config), self.trainer.backbone
        return Policy(
            self.trainer.actor.eval(),
            {
                "format": FORMAT,
                "game_version": GAME_VERSION,
                "backbone": {"name": self.name, "shape": backbone.shape(), "fingerprint": fingerprint(backbone)},
                "game": asdict(replace(self.config.game, stages=self.trainer.game.stages)),
                "actor": config["actor"],
                "keeps": self.trainer.kind.name,
                "agents": backbone.patches,
                "preprocessing": self.preprocessing,
                "training": {
                    "config": config,
                    "seed": self.seed,
                    "images_seen": self.trainer.images_seen,
                    "scale": self.trainer.scale,
                },
                "calibration": calibration,
                "dial": dial,
                "licence": "Apache-2.0",
            },
        )

    def finish(
        self, held: ImageSource, progress: Progress = silent, gmacs_ratio: float | None = None,
        calibration_images: int = 1024,
    ) -> PrunedViT:  # fmt: skip
        """Calibrate on images `held` back from learning, write the policy file, return the pruned model.

        The card recommends the dial that calibration gives for `gmacs_ratio`, or 0.5.
        """
        self.policy([]).save(self.output)  # so that an error in calibration does not lose what was learned
        batches = calibration_batches(held, self.preprocessing, self.seed, self.workers, progress, calibration_images)
        fast = prune(self.model, self.policy([]))
        fast.game.attention = deterministic_attention  # the card's figures must not depend on the machine's speed
        rows = calibrate(fast, batches, kind=kind_of(fast.game.backbone, self.trainer.kind.name))
        policy = self.policy(rows)
        policy.save(self.output)  # before a target that calibration may not reach
        if gmacs_ratio is not None:
            policy.card["dial"] = dial_for(policy.card, gmacs_ratio=gmacs_ratio)
            policy.save(self.output)
        return prune(self.model, Policy.load(self.output))

    def result(self) -> dict[str, Any]:
        """The JSON keys of `train` about the run itself: policy, images_seen, seconds, speeds."""
        seen = self.trainer.images_seen
        return {
            "policy": str(self.output),
            "images_seen": seen,
            "seconds": self.loop.seconds,
            "images_per_second": seen * self.config.rollouts / max(self.loop.seconds, 1e-9),
            "throughput_vs_native": self.throughput_vs_native(),
            "waited_for_images": self.loop.waited(),
        }

    def throughput_vs_native(self) -> float:
        """Images (times rollouts) a second in training over the native forward's, medians over the run."""
        lines = self.log.timings()
        speeds = [
            [line[f"time/{name}"] for line in lines if f"time/{name}" in line]
            for name in ("images_per_second", "native_images_per_second")
        ]
        return float(np.median(speeds[0]) / np.median(speeds[1])) if speeds[1] else float("nan")


def lasting(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    """The settings that a resumed run must share: all but the number of updates."""
    return {name: value for name, value in asdict(config).items() if name != "updates"}


def description_of(
    backbone: str, config: TrainConfig | FinetuneConfig, seed: int, device: str, about: dict[str, Any] | None
) -> dict[str, Any]:
    """What config.json says of a run: model, images, versions, command line, settings."""
    what = {"backbone": backbone, **(about or {}), "seed": seed, "folder": os.getcwd()}
    return what | conditions(torch.float32, device) | {"settings": asdict(config)}


def calibration_batches(
    held: ImageSource, preprocessing: dict[str, Any], seed: int, workers: int, progress: Progress, most: int = 1024
) -> Iterable[Batch]:
    """Batches of at most `most` images held back, in random order, because sources are sorted by class."""
    chosen = np.random.default_rng(seed).permutation(len(held.names))[:most].tolist()
    loader = plain_views(held, preprocessing, chosen).loader(32, workers)
    return progress(checked(loader, BadImages(len(chosen))), "calibrating dials", len(loader))


def trained_policy(run: TrainingRun, progress: Progress = silent) -> Policy:
    """The policy of a run, which is finished first where that is left to do. Not calibrated."""
    run.run(progress)
    run.policy([]).save(run.output)
    return Policy.load(run.output)
