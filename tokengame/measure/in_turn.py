"""Timing several calls in turn, round after round, so that disturbances of the machine affect all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from tokengame.timing import now

WARM_UP = 2
"""rounds thrown away"""
LEAST = 5
"""rounds that are counted at least"""
REST = 0.01
"""seconds between calls of different libraries: threads of each wait actively for a while when its work is done"""

Name = TypeVar("Name", bound=Hashable)


def interleave(
    calls: Mapping[Name, Callable[[], Any]], device: torch.device, seconds: float,
    tick: Callable[[float], Any] = lambda _share: None, seed: int = 0, rest: float = 0.0,
) -> dict[Name, list[float]]:  # fmt: skip
    """Seconds of each call in each round.

    Every round has another order, so that none always finds the cache as the same predecessor left it.

    Args:
        calls: by name.
        device: on which they queue work.
        seconds: to spend after warm-up.
        tick: is told the share of `seconds` that has passed.
        seed: of the orders.
        rest: seconds to wait before each call.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, generator = list(calls), random.Random(seed)
    rounds, stop = -WARM_UP, 0.0
    while rounds < LEAST or time.perf_counter() < stop:
        for name in generator.sample(order, len(order)):
            time.sleep(rest)
            start = now(device)
            calls[name]()
            if rounds >= 0:
                times[name].append(now(device) - start)
        rounds += 1
        stop = time.perf_counter() + seconds if rounds == 0 else stop
        tick(min(1.0, max(0.0, 1 - (stop - time.perf_counter()) / seconds)) if rounds > 0 else 0.0)
    return times
