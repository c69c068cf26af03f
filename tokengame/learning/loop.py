"""The loop of a training run: batches through a learner, with metrics, checkpoints, interruption and resumption."""

from __future__ import annotations

import hashlib
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tokengame.data.batches import BadImages, Batch, checked
from tokengame.data.datasets import ImageSet
from tokengame.data.loader import TrainingLoader
from tokengame.distributed import Processes
from tokengame.errors import Interrupted, TokenGameError
from tokengame.files import Progress, silent
from tokengame.learning.checkpoint import RunFolder


class Learner(Protocol):
    """What a loop trains: a policy's `Trainer` or a backbone's `Tuner`."""

    updates: int
    """updates done so far"""

    def update(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """One step on [B, channels, height, width] images; returns metrics."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def names_hash(images: ImageSet) -> str:
    """A digest of the names and labels of a set of images."""
    return hashlib.sha256(repr((images.names, images.labels)).encode()).hexdigest()


class Loop:
    """One run of a learner.

    Args:
        learner: in the state to start from.
        images: to learn from.
        transform: random, from a PIL image to a tensor.
        log: folder of the run; what lies there is deleted when a run starts that does not resume.
        config: what there is to know of the run, stored there.
        updates: of the whole run. A run that is resumed may have more than it had before.
        batch_size: images of an update, over all processes.
        seed: of order and augmentation.
        resume: continue from the checkpoint; None: if there is one of this run.
        workers: processes that decode images.
        processes: those that learn together.

    Raises:
        TokenGameError: nothing to resume, or it does not fit.
    """

    def __init__(
        self,
        learner: Learner,
        images: ImageSet,
        transform: Callable,
        log: RunFolder,
        config: dict[str, Any],
        *,
        updates: int,
        batch_size: int,
        seed: int,
        resume: bool | None,
        workers: int,
        processes: Processes,
    ):
        self.learner, self.log, self.config = learner, log, config
        self.resume = log.checkpoint.is_file() if resume is None else resume
        self.how = "run the same command again" if resume is None else "run it again with --resume"
        self.updates, self.batch_size, self.workers, self.processes = updates, batch_size, workers, processes
        self.loader = TrainingLoader(images, transform, seed, batch_size, updates, processes)
        self.tally = BadImages(self.loader.total)
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self._marks: dict[str, Any] = {}
        if self.resume:
            self._load()

    def _load(self) -> None:
        state = self.log.load()
        self._marks = state["logs"]
        try:
            done, before, self.seconds = int(state["step"]), int(state["updates"]), float(state["seconds"])
            learner = state["learner"]
        except (KeyError, TypeError, ValueError):
            raise TokenGameError(f"{self.log.checkpoint} is no checkpoint of this version of tokengame") from None
        if done > self.updates:
            raise TokenGameError(
                f"the run in {self.log.path} has done {done} updates already; --updates must be at least that, not "
                f"{self.updates}"
            )
        self.learner.load_state_dict(learner)
        if before != self.updates and self.log.main:
            warnings.warn(
                f"the run of {before} updates goes on after {done} as one of {self.updates}: the step size falls from "
                "here on as in a run of that many",
                stacklevel=2,
            )

    def batches(self) -> Iterable[Batch]:
        """This process's part of the batches that are left."""
        return checked(self.loader.loader(self.learner.updates, self.workers), self.tally)

    def run(self, progress: Progress = silent, what: str = "training", checkpoint_every: int = 50) -> None:
        """Train to the end.

        The checkpoint is written every so many updates, at the end, and when anything stops the run between updates.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, the update under way finished and saved.
            KeyboardInterrupt: after a second one.
            TokenGameError: a file cannot be written, or another run writes to the folder.
        """
        with self.log.lock():
            if self.resume:
                self.log.go_on(self.config, self._marks)
            else:
                self.log.start(self.config)
            self._run(progress, what, checkpoint_every)

    def _run(self, progress: Progress, what: str, checkpoint_every: int) -> None:
        first, whole, record = self.learner.updates, True, self.log.recorder(self.learner.updates)
        with stop_signals() as stopped:
            try:
                last = time.perf_counter()
                for batch in progress(self.batches(), lambda: self._described(what), self.updates - first):
                    start, whole = time.perf_counter(), False
                    metrics = self.learner.update(batch.images, batch.labels)
                    self.metrics = metrics | {"time/waited": start - last}  # for images
                    last = time.perf_counter()
                    self.seconds += last - start
                    record(self.learner.updates, self.metrics)  # before the checkpoint that counts this update
                    whole = True
                    if self.processes.any(bool(stopped())):
                        done = f"stopped after update {self.learner.updates} of {self.updates}, which is saved"
                        raise Interrupted(f"{done}: {self.how} to go on", stopped() or signal.SIGINT)
                    if self.learner.updates % checkpoint_every == 0:
                        self.save()
            finally:
                if whole:  # an interrupted update is half a step
                    self.save()

    def _described(self, what: str) -> str:
        """For the progress bar: what is being done, and what the last update measured."""
        shown = {
            "kl": "KL {:.3f}",
            "loss": "loss {:.3f}",
            "gmacs_ratio": "compute {:.2f}",
            "images_per_second": "{:.0f} images/s",
        }
        found = {name.rpartition("/")[2]: value for name, value in self.metrics.items()}
        return "  ".join([what, *(text.format(found[name]) for name, text in shown.items() if name in found)])

    def more(self, updates: int) -> Iterable[Batch]:
        """This process's part of so many further batches, in another order; they are not learned from."""
        loader = replace(self.loader, seed=self.loader.seed + 1, updates=updates)
        return checked(loader.loader(0, self.workers), BadImages(loader.total))

    def waited(self) -> float:
        """Share of the run's time in which the learner waited for images."""
        lines = self.log.timings()[1:] if self.log.main else []  # at first workers must start
        waited = sum(line["time/waited"] for line in lines)
        return waited / max(waited + self.seconds, 1e-9)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"learner": self.learner.state_dict(), "seconds": self.seconds, "updates": self.updates}
        self.log.save({"step": self.learner.updates, **state})


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Defer SIGINT and SIGTERM in this context, so that whole updates are saved; a second one interrupts at once.

    Yields:
        A function that returns the number of the one that has come, or 0.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        for which, handler in before.items():
            signal.signal(which, handler if callable(handler) else signal.default_int_handler)

    for which in before:
        signal.signal(which, note)
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def projection(loop: Loop, images: int) -> dict[str, Any]:
    """What a short run predicts about one over `images` images; the same for all processes.

    Returns:
        images; images_per_second that are learned from, and that could be decoded; hours; memory_gib of a process, so
        far, at batch_size images an update.
    """
    busy = sum(value for name, value in loop.metrics.items() if name in ("time/rollout", "time/update"))
    learned, decoded = loop.batch_size / busy, decoding_speed(loop) * loop.processes.size
    found = {
        "images": images,
        "images_per_second": learned,
        "images_per_second_decoded": decoded,
        "hours": images / min(learned, decoded) / 3600,
        "batch_size": loop.batch_size,
        "memory_gib": memory_taken(),
    }
    return loop.processes.gather(found)[0]


def decoding_speed(loop: Loop, images: int = 8) -> float:
    """Images a second that the workers of one process decode and transform, by doing a few here."""
    loader = replace(loop.loader, batch_size=images, updates=1, processes=Processes()).loader()
    start = time.perf_counter()
    next(iter(loader))
    return images * max(1, loop.workers) / (time.perf_counter() - start)


def memory_taken() -> float:
    """GiB: on the GPU where one was used, else of this process; nan where the system does not say (Windows)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
