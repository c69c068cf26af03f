"""Where a pruned model's time goes, and how much memory a call takes."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tokengame.backends import Backend
from tokengame.game import Observation
from tokengame.runtime import PrunedViT, cascade
from tokengame.timing import now

PARTS = ("policy", "packing", "attention", "projections and MLP", "embedding and head")


class Stopwatch:
    """Self time of nested sections: the time of an inner section is not counted for the outer one."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inner = device, defaultdict[str, float](float), [0.0]

    @contextmanager
    def section(self, part: str) -> Iterator[None]:
        """Count the time of this context for `part`."""
        start = now(self.device)
        self._inner.append(0.0)
        yield
        took = now(self.device) - start
        self.seconds[part] += took - self._inner.pop()
        self._inner[-1] += took


class TimedBackend:
    """A backend whose calls are timed; games on it are played step by step.

    The compiled kernels run attention, projections and MLPs of a stretch of blocks, and what agents observe in a merge
    game, in one call: all of it then counts as projections and MLPs.

    Args:
        backend: what computes; a copy of it opens sections within its calls.
        watch: collects the times.
    """

    PARTS_OF: ClassVar[dict[str, str]] = {
        "embed": "embedding and head",
        "head": "embedding and head",
        "run": "projections and MLP",
        "finish": "projections and MLP",
        "observe": "policy",
        "merge": "packing",
    }

    def __init__(self, backend: Backend, watch: Stopwatch):
        self.inner, self.watch = copy.copy(backend), watch
        self.inner.section = watch.section

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return self._timed(self.PARTS_OF[name], found) if name in self.PARTS_OF else found

    def _timed(self, part: str, call: Callable) -> Callable:
        def timed(*args: Any) -> Any:
            with self.watch.section(part):
                return call(*args)

        return timed

    def fused(self, *_: Any) -> None:
        """Nothing: the parts of a fused forward cannot be told apart."""


@torch.inference_mode()
def time_shares(fast: PrunedViT, images: Tensor, repeats: int = 5) -> dict[str, float]:
    """Share of the forward pass spent in each of `PARTS`, on [B, channels, height, width]; they sum to 1.

    Matching of the merge game counts as packing, as does everything that is in no other part. The policy is what it
    observes and what it computes. On a GPU every part is synchronised, so their sum takes longer than a call.
    """
    watch, game = Stopwatch(images.device), fast.game
    fast(images)  # weights are packed

    def decide(obs: Observation) -> Tensor:
        with watch.section("policy"):
            return fast.actor(obs)

    for repeat in range(repeats + 1):
        if repeat == 1:
            watch.seconds.clear()  # the first call is warm-up
        backend: Any = TimedBackend(game.backend_for(images), watch)
        with watch.section("packing"):
            cascade.predict(game, images, decide, fast.threshold, backend)
    total = sum(watch.seconds.values())
    return {part: watch.seconds[part] / total for part in PARTS}


@torch.inference_mode()
def peak_memory(call: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call takes at most beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports on stderr that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    used = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak / 2**20
