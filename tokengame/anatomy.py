"""Where a pruned model's time goes, and how much memory a call takes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tokengame.runtime import PrunedViT

PARTS = ("policy", "packing", "attention", "projections and MLP", "embedding and head")


class Stopwatch:
    """Self time of nested parts: what an inner part takes is not the outer one's."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inner = device, defaultdict[str, float](float), [0.0]

    def timed(self, part: str, function: Callable) -> Callable:
        """`function`, its time counted for `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            self._inner.append(0.0)
            result = function(*args, **kwargs)
            took = self._clock() - start
            self.seconds[part] += took - self._inner.pop()
            self._inner[-1] += took
            return result

        return call

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def _watching(fast: PrunedViT, watch: Stopwatch, images: Tensor) -> Iterator[None]:
    """Shadow the methods of this one game with timed ones, for as long as the context lasts.

    Our own kernels run attention, projections and MLPs of a stretch of blocks, and what a merge game's agents observe,
    in one call: all of it is then counted with projections and MLPs. A game that is watched is played step by step.
    """
    game, backbone = fast.game, fast.game.backbone
    attend = backbone.attend
    shadows: list[tuple[Any, str, Callable]] = [
        (game, "observe", watch.timed("policy", game.observe)),
        (game, "remove", watch.timed("packing", game.remove)),
        (game, "logits", watch.timed("embedding and head", game.logits)),
        (backbone, "embed", watch.timed("embedding and head", backbone.embed)),
        (backbone, "close", watch.timed("projections and MLP", backbone.close)),
        (backbone, "run", watch.timed("projections and MLP", backbone.run)),
        (backbone, "read_heads", watch.timed("policy", backbone.read_heads)),
        (backbone, "answer", watch.timed("attention", backbone.answer)),
        (fast.actor, "forward", watch.timed("policy", fast.actor.forward)),
    ]
    if not backbone.tiled(images):
        shadows.append((backbone, "attend", watch.timed("attention", attend)))
    for owner, name, timed in shadows:
        owner.__dict__[name] = timed
    try:
        yield
    finally:
        for owner, name, _ in shadows:
            owner.__dict__.pop(name)
        backbone.attend = attend


@torch.inference_mode()
def time_shares(fast: PrunedViT, images: Tensor, repeats: int = 5) -> dict[str, float]:
    """Share of the forward pass spent in each of `PARTS`, on [B, channels, height, width]; they sum to 1.

    The merge game's matching counts as packing, and so does everything that is in no other part; the policy is what it
    observes and what it computes. On a GPU the parts are waited for one by one, so that their sum takes longer.
    """
    watch = Stopwatch(images.device)
    fast(images)  # weights are packed
    with _watching(fast, watch, images):
        for repeat in range(repeats + 1):
            if repeat == 1:
                watch.seconds.clear()  # the first call is warm-up
            watch.timed("packing", fast)(images)
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
