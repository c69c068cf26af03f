"""A training run on disk: data order, progress, metrics, checkpoints, calibration, the policy file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from tokengame.attention import ruled_attention
from tokengame.config import GAME_VERSION, TrainConfig
from tokengame.data import BadImages, Batch, Views, checked, plain_views, transform_for
from tokengame.errors import TokenGameError
from tokengame.evaluate import calibrate
from tokengame.images import ImageSource
from tokengame.models import preprocessing_of
from tokengame.policy import FORMAT, Policy, dial_for, fingerprint
from tokengame.runtime import PrunedViT, prune
from tokengame.train import Trainer

Progress = Callable[[Iterable, str, int], Iterable]
"""Wraps an iterable of known length in a progress bar."""


def silent(iterable: Iterable, _description: str, _total: int) -> Iterable:
    """No progress bar."""
    return iterable


def require_writable(path: Path) -> None:
    """Raise TokenGameError now, not after hours, if the file `path` could not be written."""
    if path.is_dir() or not path.name:
        raise TokenGameError(f"{path} is a folder; give the name of a file in it with --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TokenGameError(f"cannot write {path} ({error.strerror}); choose another place with --output") from None


class Session:
    """One run of `train`, in `log_dir`: metrics.jsonl, TensorBoard events and checkpoint.pt.

    Args:
        model: supported timm model, on its device.
        name: the backbone's name, for the card.
        config: settings.
        images: to learn from; the policy never sees any other.
        output: the policy file.
        seed: of everything random.
        resume: continue from the checkpoint in `log_dir`.
        workers: processes that decode images.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: TrainConfig,
        images: ImageSource,
        output: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
        resume: bool = False,
        workers: int = 1,
    ):
        self.model, self.name, self.config, self.images = model, name, config, images
        self.output, self.seed, self.workers = output, seed, workers
        self.log_dir = output.with_name(output.stem + "_log")
        require_writable(output)
        require_writable(self.log_dir / "metrics.jsonl")
        if config.reward.kind != "fidelity" and images.labels is None:
            raise TokenGameError(
                f"reward {config.reward.kind!r} needs labels: give class folders and --class-map, or use fidelity"
            )
        if config.reward.target_drop is not None and images.labels is None:
            raise TokenGameError("reward.target_drop needs labelled images; without labels use reward.target_kl")
        self.trainer = Trainer(model, config, seed, device)
        self.tally = BadImages(len(images.names))
        self.preprocessing = preprocessing_of(model)
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self._resume() if resume else self._start()

    @property
    def checkpoint(self) -> Path:
        return self.log_dir / "checkpoint.pt"

    def _start(self) -> None:
        self.checkpoint.unlink(missing_ok=True)
        (self.log_dir / "metrics.jsonl").write_text("")
        (self.log_dir / "config.json").write_text(json.dumps(asdict(self.config), indent=1))

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            raise TokenGameError(f"nothing to resume: no checkpoint at {self.checkpoint}; run without --resume")
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError):
            raise TokenGameError(f"checkpoint {self.checkpoint} is damaged; run without --resume") from None
        if state["run"] != self.identity:
            raise TokenGameError(
                f"{self.checkpoint} has other settings, weights or images; resume with those, or run without --resume"
            )
        self.trainer.load_state_dict(state["trainer"])
        self.seconds = state["seconds"]
        lines = (self.log_dir / "metrics.jsonl").read_text().splitlines()[: self.trainer.updates]
        (self.log_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    @property
    def identity(self) -> str:
        """What makes a run this one: settings, seed, weights, images and the rules of the game."""
        images = hashlib.sha256("\n".join(self.images.names).encode()).hexdigest()
        return json.dumps([GAME_VERSION, asdict(self.config), self.seed, fingerprint(self.trainer.backbone), images])

    def _snapshot(self) -> dict[str, Any]:
        """The state after the last whole update; an interrupt inside the next one must not touch it."""
        return copy.deepcopy({"trainer": self.trainer.state_dict(), "run": self.identity, "seconds": self.seconds})

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint whole or not at all."""
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def batches(self) -> Iterable[Batch]:
        """The rest of the run's images: seeded permutations of the source, randomly cropped and flipped."""
        count, size, done = len(self.images.names), self.config.batch_size, self.trainer.updates
        total = self.config.updates * size
        epochs = [np.random.default_rng((self.seed, e)).permutation(count) for e in range(total // count + 1)]
        order = np.concatenate(epochs)[:total].tolist()
        transform = transform_for(self.preprocessing, train=True)
        loader = Views(self.images, order, transform, self.seed, start=done * size).loader(size, self.workers)
        return checked(loader, self.tally)

    def run(self, progress: Progress = silent, checkpoint_every: int = 50) -> None:
        """Train to the end. The checkpoint is written every so many updates, and when something stops the run."""
        left, state = self.config.updates - self.trainer.updates, self._snapshot()
        with SummaryWriter(str(self.log_dir)) as board, (self.log_dir / "metrics.jsonl").open("a") as log:
            try:
                for batch in progress(self.batches(), "training", left):
                    self._update(batch, board, log)
                    state = self._snapshot()
                    if self.trainer.updates % checkpoint_every == 0:
                        log.flush()
                        self.save(state)
            finally:
                log.flush()
                self.save(state)

    def _update(self, batch: Batch, board: SummaryWriter, log: Any) -> None:
        start = time.perf_counter()
        self.metrics = self.trainer.update(batch.images, batch.labels)
        self.seconds += time.perf_counter() - start
        step = self.trainer.updates
        for name, value in self.metrics.items():
            board.add_scalar(name, value, step)
        log.write(json.dumps({"update": step, **self.metrics}) + "\n")

    def policy(self, calibration: list[dict[str, Any]], dial: float = 0.5) -> Policy:
        """The learned policy with its card."""
        config, backbone = asdict(self.config), self.trainer.backbone
        return Policy(
            self.trainer.actor.eval(),
            {
                "format": FORMAT,
                "game_version": GAME_VERSION,
                "backbone": {"name": self.name, "shape": backbone.shape(), "fingerprint": fingerprint(backbone)},
                "game": {"stages": list(self.trainer.game.stages), "transition": self.config.game.transition},
                "actor": config["actor"],
                "agents": backbone.patches,
                "preprocessing": self.preprocessing,
                "training": {"config": config, "seed": self.seed, "images_seen": self.trainer.images_seen},
                "calibration": calibration,
                "dial": dial,
                "licence": "Apache-2.0",
            },
        )

    def finish(
        self, held: ImageSource, progress: Progress = silent, gmacs_ratio: float | None = None,
        calibration_images: int = 1024,
    ) -> PrunedViT:  # fmt: skip
        """Calibrate on images `held` back from learning, write the policy file, return the faster model.

        The card recommends the dial that calibration gives for `gmacs_ratio`, or 0.5.
        """
        self.policy([]).save(self.output)  # whatever calibration meets, what was learned is on disk
        count = min(calibration_images, len(held.names))
        chosen = np.random.default_rng(self.seed).permutation(len(held.names))[:count].tolist()
        fast = prune(self.model, self.policy([]))
        fast.game.backbone.attend = ruled_attention  # the card's figures must not depend on the machine's speed
        loader = plain_views(held, self.preprocessing, chosen).loader(32, self.workers)
        rows = calibrate(fast, progress(checked(loader, BadImages(count)), "calibrating", len(loader)))
        policy = self.policy(rows)
        policy.save(self.output)  # a wish that cannot be met must not cost the policy
        if gmacs_ratio is not None:
            policy.card["dial"] = dial_for(policy.card, gmacs_ratio=gmacs_ratio)
            policy.save(self.output)
        return prune(self.model, Policy.load(self.output))

    def result(self) -> dict[str, Any]:
        """The JSON keys of `train` that are about the run itself."""
        seen = self.trainer.images_seen
        return {
            "policy": str(self.output),
            "images_seen": seen,
            "seconds": self.seconds,
            "images_per_second": seen * self.config.rollouts / max(self.seconds, 1e-9),
            "throughput_vs_native": self.throughput_vs_native(),
        }

    def throughput_vs_native(self) -> float:
        """Images (times rollouts) a second in training over the native forward's, medians over the run."""
        lines = [json.loads(line) for line in (self.log_dir / "metrics.jsonl").read_text().splitlines()]
        speeds = [
            [line[f"time/{name}"] for line in lines] for name in ("images_per_second", "native_images_per_second")
        ]
        return float(np.median(speeds[0]) / np.median(speeds[1])) if lines else float("nan")
