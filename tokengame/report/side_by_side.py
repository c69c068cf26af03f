"""One photo through the native and the pruned model: what each makes of it, at what cost, and which tokens are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokengame.data.decode import open_image, printable, viewed
from tokengame.data.transforms import transform_for
from tokengame.errors import TokenGameError
from tokengame.measure.in_turn import interleave
from tokengame.ranges import require
from tokengame.report.gallery import Strip, strips
from tokengame.runtime import PrunedViT
from tokengame.runtime.cascade import PrunedOutput

BEST = 5
"""classes or neighbours of a photo"""
SECONDS = 0.01
"""to time in; `interleave` takes a few rounds more"""


@dataclass(frozen=True)
class Answer:
    """What one of the two models makes of a photo."""

    output: Tensor
    """[classes] logits or [width] embedding"""
    best: list[tuple[int, float]]
    """classes and their probabilities, or examples and their cosines with the photo; the best first"""
    gmacs: float
    milliseconds: float
    """of the photo alone, a batch of one; the median of a few rounds"""


@dataclass(frozen=True)
class Comparison:
    """A photo at one dial."""

    strip: Strip
    native: Answer
    pruned: Answer
    unpruned_milliseconds: float
    """of all tokens on the kernels that the pruned model runs on"""

    @property
    def same(self) -> bool:
        """Whether both predict the same class, or find the same nearest example."""
        return self.native.best[0][0] == self.pruned.best[0][0]

    @property
    def speedup(self) -> float:
        """How many times as fast the pruned model is."""
        return self.native.milliseconds / self.pruned.milliseconds

    @property
    def speedup_over_own_kernels(self) -> float:
        """The part of it that is due to pruning; the rest is that of the kernels."""
        return self.unpruned_milliseconds / self.pruned.milliseconds

    @property
    def cosine(self) -> float:
        """Of the two outputs."""
        return float(torch.cosine_similarity(self.native.output, self.pruned.output, dim=0))


class SideBySide:
    """Compares a pruned model with the model it wraps, one photo at a time, whichever thread calls.

    Args:
        fast: the pruned model.
        classes: names of the model's classes; none for an embedding, whose nearest examples are found instead.
        examples: [n, channels, height, width] as the model takes them.

    Raises:
        TokenGameError: an embedding, and fewer than two examples.
    """

    def __init__(self, fast: PrunedViT, classes: Sequence[str], examples: Tensor):
        self.fast, self.classes, self.examples = fast, classes, examples
        self._transform = transform_for(fast.game.backbone.preprocessing(), train=False)
        self._lock = Lock()  # the dial is the model's own
        self._gallery: Tensor | None = None
        if not classes:
            require(len(examples) > 1, "this model embeds, and has no classes: give two example photos or more")
            with torch.inference_mode():
                found = [fast.game.backbone.native(self._on_device(one)) for one in examples]
            self._gallery = normalize(torch.cat(found).float().cpu())

    def read(self, path: str | Path) -> Tensor:
        """The photo in a file, [channels, height, width] as the model takes it.

        Raises:
            TokenGameError: it cannot be read.
        """
        found = viewed(partial(open_image, path), self._transform)
        if isinstance(found, str):
            raise TokenGameError(f"cannot read {printable(Path(path).name)} ({found}); give another photo")
        return found

    @torch.inference_mode()
    def compare(self, photo: Tensor, dial: float, side: int = 224, example: int | None = None) -> Comparison:
        """Both models on one photo.

        Args:
            photo: [channels, height, width] as the model takes it.
            dial: how hard to prune, between 0 and 1.
            side: height of a panel in pixels.
            example: which example the photo is; it is no neighbour of its own.
        """
        with self._lock:
            images, backbone = self._on_device(photo), self.fast.game.backbone
            output = self._pruned(dial, images)
            (strip,) = strips(self.fast, images, output, side)
            outputs = {"native": backbone.native(images), "pruned": output.logits}
            seconds = self._seconds(dial, images)
            native_macs, macs = self.fast.macs(output)
        costs = {"native": native_macs, "pruned": float(macs[0])}
        answers = {}
        for name, found in outputs.items():
            result = found[0].float().cpu()
            answers[name] = Answer(result, self._best(result, example), costs[name] / 1e9, 1e3 * seconds[name])
        return Comparison(strip, unpruned_milliseconds=1e3 * seconds["unpruned"], **answers)

    def _pruned(self, dial: float, images: Tensor) -> PrunedOutput:
        self.fast.dial = dial
        return self.fast.predict(images)

    def _seconds(self, dial: float, images: Tensor) -> dict[str, float]:
        """Of the native model, the pruned one, and the pruned one at dial 0; medians of rounds in which all ran."""
        backbone = self.fast.game.backbone
        calls: dict[str, Callable[[], Any]] = {
            "native": partial(backbone.native, images),
            "pruned": partial(self._pruned, dial, images),
            "unpruned": partial(self._pruned, 0.0, images),
        }
        times = interleave(calls, backbone.device, SECONDS)
        self.fast.dial = dial
        return {name: median(rounds) for name, rounds in times.items()}

    def _best(self, output: Tensor, example: int | None) -> list[tuple[int, float]]:
        if self._gallery is None:
            scores = output.softmax(0)
        else:
            scores = self._gallery @ normalize(output, dim=0)
            if example is not None:
                scores[example] = -torch.inf
        others = len(scores) - (self._gallery is not None and example is not None)
        best = scores.topk(min(BEST, others))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def _on_device(self, photo: Tensor) -> Tensor:
        """As a batch of one."""
        backbone = self.fast.game.backbone
        return photo[None].to(backbone.device, backbone.dtype)
