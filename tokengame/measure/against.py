"""All rivals in one run: built, checked, timed in turn with the pruned model, and the fastest of the same precision."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.baselines.tome import ToMe
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Note, unsaid
from tokengame.measure.fidelity import cosines
from tokengame.measure.kinds import Kind
from tokengame.measure.rivals import RIVALS, Native, Ready, Rival
from tokengame.runtime.method import Method

TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1.0}
"""largest difference from the native output, over its largest absolute value, by precision"""
WARM_UP = 2
"""calls of a rival when it is built, beside the one that is checked"""
UNPRUNED = "unpruned"
"""all tokens on the packed runtime's kernels"""


class Rivals:
    """The rivals of one model for batches of one shape, and how like the native model each is.

    Args:
        compiled: whether those that compile take part.
        note: is told which one is being built, which takes up to minutes.
    """

    def __init__(self, compiled: bool = True, note: Note = unsaid):
        self.compiled, self.note = compiled, note
        self.ready: dict[str, Ready] = {}
        self.refused: dict[str, str] = {}
        self.likeness: dict[str, list[float]] = {}
        """of each image that was compared, by rival"""
        self.kind, self.precision, self.size = "logits", "", 0

    @torch.inference_mode()
    def build(
        self, model: nn.Module, images: Tensor, kind: Kind, tick: Callable[[float], Any] = lambda _share: None
    ) -> None:
        """Build them for batches like `images` and check what each gives.

        Args:
            model: the native one.
            images: [B, channels, height, width] on its device and in its number format.
            kind: what is compared.
            tick: is told the share that is built.
        """
        self.kind, self.precision, self.size = kind.name, str(images.dtype).removeprefix("torch."), len(images)
        want = kind.native(wrap(model), images)
        with TemporaryDirectory(prefix="tokengame", ignore_cleanup_errors=True) as folder:
            native = Native(model, images, kind, Path(folder))
            for number, rival in enumerate(RIVALS):
                tick(number / len(RIVALS))
                self._build(rival, native, want)

    def _build(self, rival: Rival, native: Native, want: Tensor) -> None:
        """Add one that gives `want`, or why it cannot."""
        try:
            if rival.compiles and not self.compiled:
                raise TokenGameError("--no-compiled leaves it out")
            self.note(f"building {rival.name}")
            with redirect_stdout(sys.stderr):  # some libraries print on stdout, which belongs to --json
                ready = rival.build(native)
            images = native.images.to(ready.takes)
            found = ready.run(images)
            check(found, want, ready.precision)
            for _ in range(WARM_UP):
                ready.run(images)
        except TokenGameError as error:
            self.refused[rival.name] = str(error)
        except Exception as error:  # each library has its own
            self.refused[rival.name] = f"it cannot run this model: {first_line(error)}"
        else:
            self.ready[rival.name], self.likeness[rival.name] = ready, alike(self.kind, want, found)

    def calls(self, images: Tensor) -> dict[str, Callable[[], Tensor]]:
        """One call of each on such a batch, whose numbers are in its format before."""
        return {name: partial(ready.run, images.to(ready.takes)) for name, ready in self.ready.items()}

    def fastest(self, milliseconds: dict[str, float]) -> str | None:
        """The name of the fastest in the model's own precision; None where none runs."""
        return fastest({name: ready.precision for name, ready in self.ready.items()}, milliseconds, self.precision)

    def rows(self, milliseconds: dict[str, float]) -> list[dict[str, Any]]:
        """One of each rival: rival, precision, milliseconds, images_per_second, agreement (of an embedding or features
        cosine), fastest of the same precision, and refused: why it did not run."""
        best, rows = self.fastest(milliseconds), []
        figure = "agreement" if self.kind == "logits" else "cosine"
        for name in [rival.name for rival in RIVALS]:
            row: dict[str, Any] = dict.fromkeys(("precision", "milliseconds", "images_per_second", figure))
            if name in self.ready:
                taken, like = milliseconds[name], self.likeness[name]
                row = {"precision": self.ready[name].precision, "milliseconds": taken}
                row |= {"images_per_second": 1e3 * self.size / taken, figure: sum(like) / len(like)}
            rows.append({"rival": name, **row, "fastest": name == best, "refused": self.refused.get(name)})
        return rows


class RivalRun:
    """Rivals beside the native and the pruned model, batch by batch, as `evaluate` runs them.

    Args:
        size: images of the batches on which they run, since they are built for one size; None: that of the first.
        note: see `Rivals`.
    """

    def __init__(self, size: int | None = None, note: Note = unsaid):
        self.rivals, self.size, self.seconds = Rivals(note=note), size, defaultdict[str, list[float]](list)
        self.unpruned: Method | None = None

    def calls(self, model: nn.Module, images: Tensor, kind: Kind) -> dict[str, Callable[[Tensor], Any]]:
        """By name, for a batch that `evaluate` measures on: of rivals, and of all tokens on the pruned model's kernels.

        They are built for the first batch of the size; of other sizes there is none.
        """
        self.size = self.size or len(images)
        if len(images) != self.size:
            return {}
        if self.unpruned is None:
            self.rivals.build(model, images, kind)
            self.rivals.likeness = {name: [] for name in self.rivals.ready}
            self.unpruned = kind.method(ToMe(model, (0,) * wrap(model).depth))
            self.unpruned.predict(images)
        calls = self.rivals.calls(images)
        return {UNPRUNED: self.unpruned.predict} | {name: _ignoring(call) for name, call in calls.items()}

    def add(self, native: Tensor, results: dict[str, tuple[Any, float]]) -> None:
        """Add the results of a batch with their seconds, among them "native" and "pruned"."""
        if UNPRUNED not in results:
            return
        for name, (output, seconds) in results.items():
            self.seconds[name].append(seconds)
            if name in self.rivals.ready:
                self.rivals.likeness[name] += alike(self.rivals.kind, native, output)

    def summary(self) -> dict[str, Any]:
        """Keys of `eval` that become other ones, and those that are new.

        Returns:
            images_per_second_native (of the fastest rival of the same precision), images_per_second_pruned, batch_size,
            speedup, speedup_over (its name), own_kernels_speedup (all tokens on the pruned model's kernels over it),
            speedup_over_own_kernels (pruned over all tokens), rivals (see `Rivals.rows`).
        """
        milliseconds = {name: 1e3 * median(seconds) for name, seconds in self.seconds.items()}
        best = self.rivals.fastest(milliseconds)
        if best is None:
            never = f"no batch of {self.size} images was measured"
            self.rivals.refused = {rival.name: never for rival in RIVALS} | self.rivals.refused
            return {"speedup_over": None, "rivals": self.rivals.rows({})}
        native, pruned, unpruned = (milliseconds[name] for name in (best, "pruned", UNPRUNED))
        return {
            "batch_size": self.rivals.size,
            "images_per_second_native": 1e3 * self.rivals.size / native,
            "images_per_second_pruned": 1e3 * self.rivals.size / pruned,
            "speedup": native / pruned,
            "speedup_over": best,
            "own_kernels_speedup": native / unpruned,
            "speedup_over_own_kernels": unpruned / pruned,
            "rivals": self.rivals.rows(milliseconds),
        }


def _ignoring(call: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda _images: call()


def fastest(precisions: dict[str, str], milliseconds: dict[str, float], precision: str) -> str | None:
    """The name of the fastest of one precision; None where there is none of it.

    Args:
        precisions, milliseconds: by name.
        precision: wanted, as "float32".
    """
    same = (name for name in precisions if precisions[name] == precision)
    return min(same, key=milliseconds.__getitem__, default=None)


def check(found: Tensor, want: Tensor, precision: str) -> None:
    """Raise TokenGameError where an output is not the native one, as far as its precision goes."""
    if found.shape != want.shape:
        raise TokenGameError(f"its output is {list(found.shape)}, and the native model's {list(want.shape)}")
    off = float((found.float() - want.float()).abs().max() / want.float().abs().max())
    if not off <= TOLERANCE[precision]:  # not finite neither
        raise TokenGameError(f"its output is not the native one: off by {off:.1e} of the largest number")


def alike(kind: str, want: Tensor, found: Tensor) -> list[float]:
    """Of each image whether the class is the same (logits), or the mean cosine of embeddings and features."""
    if kind == "logits":
        return (want.argmax(1) == found.to(want.device).argmax(1)).float().tolist()
    return cosines(want, found.to(want.device)).reshape(len(want), -1).mean(1).tolist()
