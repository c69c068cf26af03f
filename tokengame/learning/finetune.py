"""Fine-tuning a backbone through a frozen policy, by the packed execution that it will run with.

Kept tokens compute other features when others are pruned; a little tuning adapts the network to that. The gradient
flows through the rows that are left and through merging, not through decisions. Masks are not needed: packed and masked
execution give the same gradients (tests/test_game.py).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.backbones.classes import require_classes
from tokengame.backbones.parts import set_drop_path
from tokengame.config import FinetuneConfig
from tokengame.data.transforms import seeded
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError, first_line
from tokengame.learning.learner import check_labels, fitting, load_optimizer
from tokengame.learning.trainer import training_dtype
from tokengame.measure.fidelity import fidelity_loss
from tokengame.packed.attention import deterministic_attention
from tokengame.policies import Policy
from tokengame.ranges import require
from tokengame.runtime import PrunedViT


def mixing(config: FinetuneConfig, classes: int, batch: int) -> Mixup | None:
    """timm's mixup and cutmix of a process's part of a batch; None where there is neither.

    Raises:
        TokenGameError: it has an odd number of images, which are mixed in pairs.
    """
    if not (config.augment.mixup or config.augment.cutmix):
        return None
    require(
        batch % 2 == 0,
        f"--augment.mixup and cutmix mix pairs, and a process has {batch} images: use an even --batch-size",
    )
    augment = config.augment
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=classes)


class Tuner:
    """A copy of a model that is tuned, and all that changes with it; a `loop.Learner`.

    Dropout stays off, and stochastic depth unless it is configured: they change what the frozen policy observes.

    Args:
        model: the native one, on its device; it is the teacher and stays as it is.
        policy: frozen.
        dial: the operating point to tune for.
        config: settings.
        compute: pruned / native, that the dial is moved to hold: as the backbone changes, so do the decisions of the
            policy that observes it. None leaves the dial alone.
        processes: those that tune together; each takes its part of every batch.
        seed: of mixed images and stochastic depth.

    Raises:
        TokenGameError: the model has no classes, no place for stochastic depth that is wanted, or batches are odd that
            are to be mixed; or timm knows no such optimiser or schedule.
    """

    def __init__(
        self, model: Any, policy: Policy, dial: float, config: FinetuneConfig, compute: float | None = None,
        processes: Processes | None = None, seed: int = 0,
    ):  # fmt: skip
        self.config, self.compute, self.processes, self.seed = config, compute, processes or Processes(), seed
        backbone = wrap(model)
        require_classes(backbone)
        self.device, self.classes = backbone.device, backbone.classes
        self.dtype = training_dtype(config.dtype, self.device)
        kernels.announce(self.dtype, self.device.type)
        self.teacher = copy.deepcopy(model).to(self.dtype).eval().requires_grad_(False)
        self.student = copy.deepcopy(model).float().eval().requires_grad_(True)
        self.drops = set_drop_path(self.student, rate) if (rate := config.augment.drop_path) else []
        nowhere = "--augment.drop-path: this model's blocks have no place for stochastic depth; leave it out"
        require(bool(self.drops or not rate), nowhere)
        self.mix = mixing(config, self.classes, self.processes.local_batch(config.batch_size))
        policy.actor.to(self.device).requires_grad_(False)
        self.fast = PrunedViT(self.student, policy, dial)
        self.fast.game.attention = deterministic_attention  # bitwise repeatable
        self.updates = self.images_seen = 0
        try:
            self.optimizer = create_optimizer_v2(self.student, config.opt, config.step_size, config.weight_decay)
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer, config.sched, num_epochs=1, updates_per_epoch=config.updates, step_on_epochs=False,
                warmup_epochs=config.warmup, warmup_lr=0.0, decay_epochs=1 / 3, decay_milestones=[1 / 3, 2 / 3],
            )  # fmt: skip
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            named = f"optimiser {config.opt!r} and schedule {config.sched!r}"
            raise TokenGameError(f"timm does not make {named} ({first_line(error)})") from None
        self.ema = None if config.ema is None else ModelEmaV3(self.student, decay=config.ema, use_warmup=True)

    def update(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """One step on [B, channels, height, width] images.

        Raises:
            TokenGameError: labels are wanted and there are none, or they are no classes of the model; or the loss is
                not finite.
        """
        check_labels(labels, len(images), self.classes)
        start = time.perf_counter()
        images, labels = images.to(self.device), None if labels is None else labels.to(self.device)
        with seeded(hash((self.seed, self.updates, self.processes.rank)) & 0x7FFFFFFF):
            if self.mix is not None and labels is not None:
                images, labels = self.mix(images, labels)
            with torch.no_grad():
                native = self.teacher(images.to(self.dtype)).float()
            with self._dropping(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = self.fast.predict(images, gradients=True)
        loss, metrics = self._loss(native, output.logits.float(), labels)
        if not loss.isfinite():
            raise TokenGameError(f"the loss is not finite in update {self.updates}; lower lr")
        self._step(loss)
        self.images_seen += len(images) * self.processes.size
        full, macs = self.fast.macs(output)
        metrics |= {"tune/loss": float(loss.detach()), "tune/gmacs_ratio": float(macs.mean()) / full}
        seconds = time.perf_counter() - start
        speed = len(images) * self.processes.size / seconds
        metrics = self.processes.mean(metrics | {"time/update": seconds, "time/images_per_second": speed})
        self._hold(metrics["tune/gmacs_ratio"])
        return metrics | {"charts/dial": self.fast.dial}

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Stochastic depth is on in this context, and only in it: the tuned model is measured without."""
        for drop in self.drops:
            drop.train()
        try:
            yield
        finally:
            for drop in self.drops:
                drop.eval()

    def _hold(self, measured: float) -> None:
        """Move the dial towards the wanted compute; a gain at which the noise of single batches hardly moves it."""
        if self.compute is not None:
            logit = math.log(self.fast.dial / (1 - self.fast.dial)) + 0.5 * (measured - self.compute)
            self.fast.dial = 1 / (1 + math.exp(-logit))

    def _loss(self, native: Tensor, pruned: Tensor, labels: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        kl = fidelity_loss(native, pruned).mean()
        agreement = (native.argmax(1) == pruned.argmax(1)).float().mean()
        metrics = {"tune/kl": float(kl.detach()), "tune/agreement": float(agreement)}
        loss = self.config.distill * kl
        if self.config.labels:
            if labels is None:
                raise TokenGameError("labels=... needs labelled images; without labels use distill alone")
            smoothing = self.config.augment.smoothing if self.mix is None else 0.0  # mixed labels are smoothed already
            loss = loss + self.config.labels * F.cross_entropy(pruned, labels, label_smoothing=smoothing)
            likeliest = labels if labels.ndim == 1 else labels.argmax(1)
            metrics["tune/top1"] = float((pruned.argmax(1) == likeliest).float().mean())
        return loss, metrics

    def _step(self, loss: Tensor) -> None:
        if self.scheduler is not None:  # "none"
            self.scheduler.step_update(self.updates + 1)  # the first step has a size too
        self.optimizer.zero_grad()
        (loss / self.processes.size).backward()
        parameters = list(self.student.parameters())
        self.processes.sum_gradients(parameters)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.student, step=self.updates)

    def tuned(self) -> nn.Module:
        """The tuned model (its moving average, where there is one), in evaluation mode."""
        model = self.student if self.ema is None else self.ema.module
        return copy.deepcopy(model).eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the schedule is a function of `updates`."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "updates": self.updates,
            "images_seen": self.images_seen,
            "dial": self.fast.dial,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            TokenGameError: it is of another model, or incomplete.
        """
        with fitting("model"):
            self.student.load_state_dict(state["student"])
            load_optimizer(self.optimizer, state["optimizer"])
            if (self.ema is None) != (state["ema"] is None):
                raise ValueError("one of both has no moving average (--ema)")
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.updates, self.images_seen = int(state["updates"]), int(state["images_seen"])
            self.fast.dial = float(state["dial"])
