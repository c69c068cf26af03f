"""Native beside pruned on the same images in the same run: quality, compute, speed."""

from __future__ import annotations

import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median, mode
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from tokengame.backbones import unfused
from tokengame.backbones.classes import require_classes
from tokengame.data.batches import Batch
from tokengame.errors import TokenGameError
from tokengame.measure.fidelity import fidelity_loss
from tokengame.measure.risk import interval, upper_bound
from tokengame.runtime import PrunedViT
from tokengame.runtime.method import Method
from tokengame.timing import now

CALIBRATION_DIALS = tuple(round(1 / (1 + math.exp(-logit)), 4) for logit in np.arange(-6, 2.01, 0.5))
"""dials that calibration measures: evenly spaced thresholds on the keep logits, from -6 to 2"""

RATIOS = (0.8, 0.7, 0.6)
"""pruned / native compute at which methods are compared"""


@dataclass
class Scores:
    """One entry per image, in the loader's order."""

    index: list[int] = field(default_factory=list)
    correct_native: list[bool] = field(default_factory=list)
    correct_pruned: list[bool] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    """the native model's probability of its own prediction"""
    macs: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    """tokens left after each stage"""
    positions: list[Tensor] = field(default_factory=list)
    """grid positions of the tokens left at the end"""
    macs_native: float = 0.0
    tokens: int = 0
    fallback: list[int] = field(default_factory=list)
    """how many images of each batch fell back to all tokens"""
    seconds: list[tuple[int, float, float]] = field(default_factory=list)
    """of each batch: size, native, pruned"""
    seconds_pytorch: list[float] = field(default_factory=list)
    """of each batch, pruned on PyTorch's kernels, where these were timed too"""

    @staticmethod
    def joined(parts: list[Scores]) -> Scores:
        """The scores of several processes in one."""
        whole = copy.copy(parts[0])
        for part in parts[1:]:
            for name, value in vars(part).items():
                if isinstance(value, list):
                    setattr(whole, name, getattr(whole, name) + value)
            whole.macs_native, whole.tokens = part.macs_native or whole.macs_native, part.tokens or whole.tokens
        return whole

    def summary(self) -> dict[str, Any]:
        """The JSON keys of `eval`."""
        count, macs = len(self.agree), np.asarray(self.macs)
        if not count:
            raise TokenGameError("no readable image to measure on")
        return {
            "images": count,
            **self._labelled(),
            "agreement": float(np.mean(self.agree)),
            "kl": float(np.mean(self.kl)),
            "gmacs_native": self.macs_native / 1e9,
            "gmacs_pruned": float(macs.mean()) / 1e9,
            "gmacs_ratio": float(macs.mean()) / self.macs_native,
            "gmacs_ratio_std": float(macs.std()) / self.macs_native,
            "compute_vs_uncertainty": self._adaptivity(),
            "fallback_share": sum(self.fallback) / count,
            "tokens_kept": [float(n) for n in np.mean(self.kept, 0)],
            "tokens": self.tokens,
            **self._speed(),
        }

    def _adaptivity(self) -> float | None:
        """Spearman's rank correlation over images of compute and native uncertainty; None where one is flat."""
        macs, uncertainty = np.asarray(self.macs), -np.asarray(self.confidence)
        if np.ptp(macs) == 0 or np.ptp(uncertainty) == 0:
            return None
        return float(spearmanr(macs, uncertainty).statistic)

    def _speed(self) -> dict[str, Any]:
        """Medians over the batches of the most frequent size; a short last batch would not be comparable."""
        if not self.seconds:
            return {}
        size = mode(size for size, _, _ in self.seconds)
        native = median(native for batch, native, _ in self.seconds if batch == size)
        pruned = median(pruned for batch, _, pruned in self.seconds if batch == size)
        found = {
            "batch_size": size,
            "images_per_second_native": size / native,
            "images_per_second_pruned": size / pruned,
            "speedup": native / pruned,
        }
        if self.seconds_pytorch:
            pairs = zip(self.seconds, self.seconds_pytorch, strict=True)
            found["speedup_pytorch"] = native / median(plain for (batch, _, _), plain in pairs if batch == size)
        return found

    def _labelled(self) -> dict[str, Any]:
        if not self.correct_native:
            return dict.fromkeys(("top1_native", "top1_pruned", "drop_pp", "drop_pp_ci95"))
        lost, gained = self.lost_and_gained()
        images = len(self.correct_native)
        return {
            "top1_native": float(np.mean(self.correct_native)),
            "top1_pruned": float(np.mean(self.correct_pruned)),
            "drop_pp": 100 * (lost - gained) / images,
            "drop_pp_ci95": [100 * end for end in interval(lost, gained, images)],
        }

    def lost_and_gained(self) -> tuple[int, int]:
        """How many images the native model alone got right, and the pruned one alone: each is its own control."""
        native, pruned = np.asarray(self.correct_native), np.asarray(self.correct_pruned)
        return int((native & ~pruned).sum()), int((pruned & ~native).sum())


def faster_native(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` with fused or unfused attention, whichever is faster on [B, channels, height, width] images.

    The minimum of several alternating calls decides: a disturbance only makes a call longer.
    """
    forms, seconds = [model, unfused(model)], [math.inf, math.inf]
    for form in forms:
        form(images)  # the first call makes kernels and fills caches
    stop = time.perf_counter() + 4.0  # large models take long, and are disturbed the less
    for _ in range(5):
        for which, form in enumerate(forms):
            seconds[which] = min(seconds[which], timed(images.device, form, images)[1])
        if time.perf_counter() > stop:
            break
    return forms[seconds.index(min(seconds))]


def timed(device: torch.device, call: Callable[[Tensor], Any], images: Tensor) -> tuple[Any, float]:
    """The result of `call` on `images`, and the seconds it took."""
    start = now(device)
    result = call(images)
    return result, now(device) - start


def keep_freed_memory() -> bool:
    """Tell glibc, for the whole process, to keep freed memory; returns whether it does. For programs that time.

    By default large tensors get fresh pages from the system again and again, in one process and not in the next. The
    same native model is then a third slower by chance, and a model that needs less memory seems faster than it is.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold = -4, -1  # names of options in malloc.h
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


@torch.inference_mode()
def evaluate(fast: PrunedViT, batches: Iterable[Batch], reference: nn.Module | None = None) -> Scores:
    """Measure the pruned model against the model it wraps, or against `reference` where the backbone was tuned.

    Every batch goes through both, in alternating order, after a warm-up on the first batch, which also decides whether
    native runs with fused or unfused attention. The time is the whole call, policy and packing included.

    Raises:
        TokenGameError: the model predicts no classes.
    """
    require_classes(fast.game.backbone)
    weight, model = next(fast.model.parameters()), reference or fast.model
    scores = Scores()
    for number, batch in enumerate(batches):
        images = batch.images.to(weight.device, weight.dtype)
        if not number:
            model = faster_native(model, images)
            fast(images)
        calls: dict[str, Callable[[Tensor], Any]] = {"native": model, "pruned": fast.predict}
        order = sorted(calls, reverse=number % 2 == 0)
        results = {name: timed(weight.device, calls[name], images) for name in order}
        (native, seconds_native), (output, seconds_pruned) = results["native"], results["pruned"]
        scores.seconds.append((len(images), seconds_native, seconds_pruned))
        score(scores, fast, batch, native.float(), output)
        scores.positions += [image.nonzero().squeeze(1) for image in output.alive.cpu()]
    return scores


def score(scores: Scores, method: Method, batch: Batch, native: Tensor, output: Any) -> None:
    """Add a batch to `scores`: native logits [B, classes], and the output of `method`.

    Raises:
        TokenGameError: the native prediction is not finite.
    """
    if not native.isfinite().all():
        raise TokenGameError("the native model's prediction is not finite; check its weights")
    pruned = output.logits.float()
    scores.index += batch.index.tolist()
    if batch.labels is not None:
        labels = batch.labels.to(native.device)
        scores.correct_native += (native.argmax(1) == labels).tolist()
        scores.correct_pruned += (pruned.argmax(1) == labels).tolist()
    scores.agree += (native.argmax(1) == pruned.argmax(1)).tolist()
    scores.kl += fidelity_loss(native, pruned).tolist()
    scores.confidence += native.softmax(1).amax(1).tolist()
    scores.macs_native, macs = method.macs(output)
    scores.tokens = output.total
    scores.fallback.append(len(getattr(output, "fallback", ())))
    scores.macs += macs.tolist()
    scores.kept += torch.stack(output.kept, 1).tolist() if output.kept else [[] for _ in macs]


@torch.inference_mode()
def calibrate(
    fast: PrunedViT, batches: Iterable[Batch], dials: tuple[float, ...] = CALIBRATION_DIALS,
    reference: nn.Module | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each dial costs and keeps. The guarantee holds only on images that the policy has not learned from.

    Measured against the model that is pruned, or against `reference` where the backbone was tuned.

    Returns:
        One row per dial, gentlest first: dial, gmacs, gmacs_ratio, keep (share of the tokens left at the end),
        agreement, kl, drop_pp, drop_pp_ci95, images, and drop_pp_bound95: the upper bound of the drop at 95 %
        confidence (None without labels; see `measure.risk`).

    Raises:
        TokenGameError: the model predicts no classes.
    """
    require_classes(fast.game.backbone)
    weight, wanted, model = next(fast.model.parameters()), fast.dial, reference or fast.model
    scores = {dial: Scores() for dial in sorted(dials)}
    for batch in batches:
        images = batch.images.to(weight.device, weight.dtype)
        native = model(images).float()
        for dial, found in scores.items():
            fast.dial = dial
            score(found, fast, batch, native, fast.predict(images))
    fast.dial = wanted
    return [{"dial": dial, **_calibrated(found)} for dial, found in scores.items()]


def _calibrated(scores: Scores) -> dict[str, Any]:
    summary = scores.summary()
    row = {name: summary[name] for name in ("gmacs_ratio", "agreement", "kl", "drop_pp", "drop_pp_ci95", "images")}
    row |= {"gmacs": summary["gmacs_pruned"], "keep": summary["tokens_kept"][-1] / scores.tokens}
    bound = None
    if scores.correct_native:
        bound = 100 * upper_bound(*scores.lost_and_gained(), len(scores.correct_native))
    return row | {"drop_pp_bound95": bound}


def at_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Agreement and KL of one method where its settings meet each of `RATIOS`, nan where they do not reach it.

    Between settings agreement is taken as linear in compute, KL as linear in its logarithm.
    """
    rows = sorted(rows, key=lambda row: row["gmacs_ratio"])
    ratios = [row["gmacs_ratio"] for row in rows]
    found = {}
    for ratio in RATIOS:
        inside = ratios[0] <= ratio <= ratios[-1]
        logs = [np.log(row["kl"] + 1e-9) for row in rows]
        found[f"agreement_{ratio}"] = (
            float(np.interp(ratio, ratios, [r["agreement"] for r in rows])) if inside else np.nan
        )
        found[f"kl_{ratio}"] = float(np.exp(np.interp(ratio, ratios, logs))) if inside else np.nan
    return found
