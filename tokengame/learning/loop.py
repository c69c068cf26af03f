"""The loop of a training run: batches through a learner, with metrics, checkpoints, interruption and resumption."""

from __future__ import annotations

import hashlib
import resource
import signal
import sys
import threading
import time
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
        config: of the run, stored there.
        updates: of the whole run.
        batch_size: images of an update, over all processes.
        seed: of order and augmentation.
        resume: continue from the checkpoint; None: if there is one of this run.
        workers: processes that decode images.
        processes: those that learn together.
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
        self.resume = log.resumable() if resume is None else resume
        self.updates, self.batch_size, self.workers, self.processes = updates, batch_size, workers, processes
        self.loader = TrainingLoader(images, transform, seed, batch_size, updates, processes)
        self.tally = BadImages(self.loader.total)
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        if self.resume:
            state = log.resume()
            learner.load_state_dict(state["learner"])
            self.seconds = state["seconds"]

    def batches(self) -> Iterable[Batch]:
        """This process's part of the batches that are left."""
        return checked(self.loader.loader(self.learner.updates, self.workers), self.tally)

    def run(self, progress: Progress = silent, what: str = "training", checkpoint_every: int = 50) -> None:
        """Train to the end.

        The checkpoint is written every so many updates, at the end, and when anything stops the run between updates.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, the update under way finished.
        """
        if not self.resume:
            self.log.start(self.config)
        first, whole = self.learner.updates, True
        with self.log.recorder(first) as record, stop_signals() as stopped:
            try:
                last = time.perf_counter()
                for batch in progress(self.batches(), what, self.updates - first):
                    start, whole = time.perf_counter(), False
                    metrics = self.learner.update(batch.images, batch.labels)
                    self.metrics = metrics | {"time/waited": start - last}  # for images
                    last = time.perf_counter()
                    self.seconds += last - start
                    record(self.learner.updates, self.metrics)  # before the checkpoint that counts this update
                    whole = True
                    if self.processes.any(stopped()):
                        raise KeyboardInterrupt
                    if self.learner.updates % checkpoint_every == 0:
                        self.save()
            finally:
                if whole:  # an interrupted update is half a step
                    self.save()

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
        state = {"learner": self.learner.state_dict(), "seconds": self.seconds}
        self.log.save({"step": self.learner.updates, **state})


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Defer SIGINT and SIGTERM in this context, so that whole updates are saved; a second one interrupts at once.

    Yields:
        A function that says whether one has come.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        for which in before:
            signal.signal(which, signal.default_int_handler)

    for which in before:
        signal.signal(which, note)
    try:
        yield lambda: bool(seen)
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
    """GiB: on the GPU where one was used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
