"""Native beside pruned on the same images in the same run: quality, compute, speed."""

from __future__ import annotations

import ctypes
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokengame.backbones import unfused, wrap
from tokengame.data.batches import Batch
from tokengame.measure.against import RivalRun
from tokengame.measure.in_turn import REST
from tokengame.measure.kinds import Kind, kind_of
from tokengame.runtime import PrunedViT
from tokengame.timing import now

CALIBRATION_DIALS = tuple(round(1 / (1 + math.exp(-logit)), 4) for logit in np.arange(-6, 2.01, 0.5))
"""dials that calibration measures: evenly spaced thresholds on the keep logits, from -6 to 2"""

RATIOS = (0.8, 0.7, 0.6)
"""pruned / native compute at which methods are compared"""


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
def evaluate(
    fast: PrunedViT, batches: Iterable[Batch], reference: nn.Module | None = None, kind: Kind | None = None,
    rivals: RivalRun | None = None,
) -> Any:  # fmt: skip
    """Measure the pruned model against the model it wraps, or against `reference` where the backbone was tuned.

    Every batch goes through both, in alternating order, after a warm-up on the first batch, which also decides whether
    native runs with fused or unfused attention. The time is the whole call, policy and packing included.

    Args:
        fast: the pruned model.
        batches: of images, labelled or not.
        reference: the native model.
        kind: what is compared; by default what the model gives.
        rivals: takes the times of other forms of the native model, which then run on each batch too, in random order.

    Returns:
        `measure.scores.Scores`, or those of the kind.

    Raises:
        TokenGameError: the model does not give what is to be compared.
    """
    kind = kind or kind_of(fast.game.backbone)
    weight, model = next(fast.model.parameters()), reference or fast.model
    scores, method, backbone = kind.scores(), kind.method(fast), wrap(model)
    for number, batch in enumerate(batches):
        images = batch.images.to(weight.device, weight.dtype)
        if not number:
            backbone = wrap(faster_native(model, images))
            method.predict(images)
        calls: dict[str, Callable[[Tensor], Any]] = {
            "native": partial(kind.native, backbone), "pruned": method.predict
        }  # fmt: skip
        if rivals is not None:
            calls |= rivals.calls(model, images, kind)
        results = {name: timed(weight.device, calls[name], images) for name in _in_order(calls, number)}
        (native, seconds_native), (output, seconds_pruned) = results["native"], results["pruned"]
        scores.seconds.append((len(images), seconds_native, seconds_pruned))
        if rivals is not None:
            rivals.add(native, results)
        scores.add(method, batch, native.float(), output)
        scores.positions += [image.nonzero().squeeze(1) for image in output.alive.cpu()]
    return scores


def _in_order(calls: dict[str, Any], number: int) -> Iterator[str]:
    """The names in the order of batch `number`: two in turn, more at random and with a rest before each."""
    if len(calls) == 2:
        yield from sorted(calls, reverse=number % 2 == 0)
        return
    for name in random.Random(number).sample(sorted(calls), len(calls)):
        time.sleep(REST)
        yield name


@torch.inference_mode()
def calibrate(
    fast: PrunedViT, batches: Iterable[Batch], dials: tuple[float, ...] = CALIBRATION_DIALS,
    reference: nn.Module | None = None, kind: Kind | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each dial costs and keeps. The guarantee holds only on images that the policy has not learned from.

    Args:
        fast: the pruned model.
        batches: of images; labels are needed only to guarantee a drop of top-1.
        dials: to measure.
        reference: the native model, where the backbone was tuned.
        kind: what is compared; by default what the model gives.

    Returns:
        One row per dial, gentlest first: dial, gmacs, gmacs_ratio, keep (share of the tokens left at the end), images;
        of logits agreement, kl, drop_pp, drop_pp_ci95, and drop_pp_bound95: the upper bound of the drop at 95 %
        confidence (None without labels; see `measure.risk`); of others distance (mean 1 - cosine), distance_bound95
        and the figures of the kind.

    Raises:
        TokenGameError: the model does not give what is to be compared.
    """
    kind = kind or kind_of(fast.game.backbone)
    weight, wanted, backbone = next(fast.model.parameters()), fast.dial, wrap(reference or fast.model)
    method, scores = kind.method(fast), {dial: kind.scores() for dial in sorted(dials)}
    for batch in batches:
        images = batch.images.to(weight.device, weight.dtype)
        native = kind.native(backbone, images).float()
        for dial, found in scores.items():
            fast.dial = dial
            found.add(method, batch, native, method.predict(images))
    fast.dial = wanted
    return [{"dial": dial, **found.row()} for dial, found in scores.items()]


CURVES = {"agreement": False, "kl": True, "same_neighbour": False, "distance": True}
"""figures that are compared at the same compute, and whether their logarithm is linear in compute between settings"""


def at_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Those of `CURVES` that one method has, where its settings meet each of `RATIOS`; nan where they do not."""
    rows = sorted(rows, key=lambda row: row["gmacs_ratio"])
    ratios = [row["gmacs_ratio"] for row in rows]
    curves = {name: np.array([row[name] for row in rows]) for name in CURVES if name in rows[0]}
    found = {}
    for ratio in RATIOS:
        inside = ratios[0] <= ratio <= ratios[-1]
        for name, values in curves.items():
            found[f"{name}_{ratio}"] = _between(ratio, ratios, values, CURVES[name]) if inside else np.nan
    return found


def _between(ratio: float, ratios: list[float], values: np.ndarray, logarithmic: bool) -> float:
    if logarithmic:
        return float(np.exp(np.interp(ratio, ratios, np.log(values + 1e-9))))
    return float(np.interp(ratio, ratios, values))
