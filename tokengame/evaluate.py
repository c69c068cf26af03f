"""Native beside pruned on the same images in the same run: quality, compute, time."""

from __future__ import annotations

import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from statistics import median, mode
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from tokengame.data import Batch
from tokengame.errors import TokenGameError
from tokengame.promise import upper_bound
from tokengame.rewards import fidelity_loss
from tokengame.runtime import PrunedViT

CALIBRATION_DIALS = tuple(round(1 / (1 + math.exp(-logit)), 4) for logit in np.arange(-6, 2.01, 0.5))

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
    """the native model's in its own prediction"""
    macs: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    """tokens alive after each stage"""
    positions: list[Tensor] = field(default_factory=list)
    """grid positions alive at the end"""
    macs_native: float = 0.0
    tokens: int = 0
    again: list[int] = field(default_factory=list)
    """how many images of each batch were looked at twice"""
    seconds: list[tuple[int, float, float]] = field(default_factory=list)
    """of each batch: size, native, pruned"""
    seconds_pytorch: list[float] = field(default_factory=list)
    """of each batch, pruned on PyTorch's kernels, where it was also timed on them"""

    @staticmethod
    def joined(parts: list[Scores]) -> Scores:
        """What several processes measured, in one."""
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
            "looked_twice": sum(self.again) / count,
            "tokens_kept": [float(n) for n in np.mean(self.kept, 0)],
            "tokens": self.tokens,
            **self._speed(),
        }

    def _adaptivity(self) -> float | None:
        """Spearman's rank correlation over images of compute with the native model's doubt; None where one is flat."""
        macs, doubt = np.asarray(self.macs), -np.asarray(self.confidence)
        if np.ptp(macs) == 0 or np.ptp(doubt) == 0:
            return None
        return float(spearmanr(macs, doubt).statistic)

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
        native, pruned = np.asarray(self.correct_native, float), np.asarray(self.correct_pruned, float)
        lost = 100 * (native - pruned)  # paired: each image is its own control
        half = 1.96 * float(lost.std(ddof=1)) / len(lost) ** 0.5 if len(lost) > 1 else float("nan")
        drop = float(lost.mean())
        return {
            "top1_native": float(native.mean()),
            "top1_pruned": float(pruned.mean()),
            "drop_pp": drop,
            "drop_pp_ci95": [drop - half, drop + half],
        }


class Method(Protocol):
    """Whatever makes predictions with fewer tokens: our pruned model and its peers."""

    def play(self, images: Tensor) -> Any:
        """Run [B, channels, height, width] to the end of the network; the result knows `kept` and `total`, and `again`
        of a method that looks twice."""

    def logits(self, end: Any) -> Tensor:
        """[B, classes]"""

    def macs(self, end: Any) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] as it was run."""


def written_out(model: Any) -> Any:
    """`model` with attention as two products and a softmax, on some processors faster; the same weights in memory."""
    written = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in written.blocks:
        block.attn.fused_attn = False
    return written


def faster_native(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` as it is or with attention written out, whichever is faster on [B, channels, height, width] images.

    The least of several calls in turn decides, for what disturbs a call only makes it longer.
    """
    forms, seconds = [model, written_out(model)], [math.inf, math.inf]
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
    """What `call` makes of `images`, and the seconds it took."""
    start = time.perf_counter()
    result = call(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def keep_heap() -> bool:
    """Tell glibc, for the whole process, to keep freed memory; whether it does. For programs that time.

    As it is set by default, big tensors come as fresh pages from the kernel again and again, in one process and not in
    the next: the same native model is a third slower by chance, and whatever needs less memory looks the faster for it.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold = -4, -1  # names of options in malloc.h
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


@torch.inference_mode()
def evaluate(fast: PrunedViT, batches: Iterable[Batch], reference: nn.Module | None = None) -> Scores:
    """Measure the pruned model against the model it wraps, or against `reference` where that was tuned.

    Every batch goes through both, in turn first and second, after a warm-up on the first, which also decides whether
    the native model attends fused or written out. The time is the whole call, policy and packing included.
    """
    weight, model = next(fast.model.parameters()), reference or fast.model
    scores = Scores()
    for number, batch in enumerate(batches):
        images = batch.images.to(weight.device, weight.dtype)
        if not number:
            model = faster_native(model, images)
            fast(images)
        calls: dict[str, Callable[[Tensor], Any]] = {"native": model, "pruned": partial(run, fast)}
        order = sorted(calls, reverse=number % 2 == 0)
        results = {name: timed(weight.device, calls[name], images) for name in order}
        (native, seconds_native), ((played, pruned), seconds_pruned) = results["native"], results["pruned"]
        scores.seconds.append((len(images), seconds_native, seconds_pruned))
        score(scores, fast, batch, native.float(), pruned.float(), played)
        scores.positions += [image.nonzero().squeeze(1) for image in played.alive.cpu()]
    return scores


def run(method: Method, images: Tensor) -> tuple[Any, Tensor]:
    """The end of the network and the prediction [B, classes]."""
    end = method.play(images)
    return end, method.logits(end)


def score(scores: Scores, method: Method, batch: Batch, native: Tensor, pruned: Tensor, end: Any) -> None:
    """Add a batch to `scores`: logits [B, classes] of the native model and of the method, and where the latter ended.

    Raises:
        TokenGameError: the native prediction is not finite.
    """
    if not native.isfinite().all():
        raise TokenGameError("the native model's prediction is not finite; check its weights")
    scores.index += batch.index.tolist()
    if batch.labels is not None:
        labels = batch.labels.to(native.device)
        scores.correct_native += (native.argmax(1) == labels).tolist()
        scores.correct_pruned += (pruned.argmax(1) == labels).tolist()
    scores.agree += (native.argmax(1) == pruned.argmax(1)).tolist()
    scores.kl += fidelity_loss(native, pruned).tolist()
    scores.confidence += native.softmax(1).amax(1).tolist()
    scores.macs_native, macs = method.macs(end)
    scores.tokens = end.total
    scores.again.append(len(getattr(end, "again", ())))
    scores.macs += macs.tolist()
    scores.kept += torch.stack(end.kept, 1).tolist() if end.kept else [[] for _ in macs]


@torch.inference_mode()
def calibrate(
    fast: PrunedViT, batches: Iterable[Batch], dials: tuple[float, ...] = CALIBRATION_DIALS,
    reference: nn.Module | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each dial costs and keeps, on images that the policy has not learned from, or its promise is void.

    Measured against the model that is pruned, or against `reference` where that was tuned.

    Returns:
        A row a dial, gentlest first: dial, gmacs, gmacs_ratio, keep (share of the tokens alive at the end), agreement,
        kl, drop_pp, drop_pp_ci95, images, and drop_pp_bound95: what 95 % confidence can promise of the drop (None
        without labels; see `promise`).
    """
    weight, wanted, model = next(fast.model.parameters()), fast.dial, reference or fast.model
    scores = {dial: Scores() for dial in sorted(dials)}
    for batch in batches:
        images = batch.images.to(weight.device, weight.dtype)
        native = model(images).float()
        for dial, found in scores.items():
            fast.dial = dial
            state, pruned = run(fast, images)
            score(found, fast, batch, native, pruned.float(), state)
    fast.dial = wanted
    return [{"dial": dial, **_calibrated(found)} for dial, found in scores.items()]


def _calibrated(scores: Scores) -> dict[str, Any]:
    summary = scores.summary()
    row = {name: summary[name] for name in ("gmacs_ratio", "agreement", "kl", "drop_pp", "drop_pp_ci95", "images")}
    row |= {"gmacs": summary["gmacs_pruned"], "keep": summary["tokens_kept"][-1] / scores.tokens}
    bound = None
    if scores.correct_native:
        native, pruned = np.asarray(scores.correct_native), np.asarray(scores.correct_pruned)
        lost, gained = int((native & ~pruned).sum()), int((pruned & ~native).sum())
        bound = 100 * upper_bound(lost, gained, len(native))
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
