"""What a run of learning leaves on disk, so that it can be watched, interrupted at any moment, and gone on with.

`metrics.jsonl` repeats: a run that was killed and resumed ends with the same bytes as one that never was. What the
clock says goes to `timings.jsonl`, both to TensorBoard. Of several processes the first one writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from tokengame.errors import TokenGameError

Progress = Callable[[Iterable, str, int], Iterable]
"""Wraps an iterable of known length in a progress bar."""
Metrics = dict[str, float]


def silent(iterable: Iterable, _description: str, _total: int) -> Iterable:
    """No progress bar."""
    return iterable


def require_writable(path: Path) -> None:
    """Raise TokenGameError now, not after hours, if the file `path` could not be written."""
    if path.is_dir() or not path.name:
        raise TokenGameError(f"{path} is a folder; give the name of a file in it with --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TokenGameError(f"cannot write {path} ({error.strerror}); choose another place with --output") from None


def write_whole(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


class RunDir:
    """The folder of one run: config.json, metrics.jsonl, timings.jsonl, TensorBoard events, checkpoint.pt.

    Args:
        path: the folder.
        identity: what makes the run this one; only such a checkpoint is gone on with.
        main: whether this process writes.
    """

    def __init__(self, path: Path, identity: str, main: bool = True):
        self.path, self.identity, self.main = path, identity, main
        require_writable(path / "metrics.jsonl")

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def files(self) -> tuple[Path, Path]:
        """of metrics and of timings"""
        return self.path / "metrics.jsonl", self.path / "timings.jsonl"

    def start(self, config: dict[str, Any]) -> None:
        """Forget what an earlier run left."""
        if self.main:
            self.checkpoint.unlink(missing_ok=True)
            for file in self.files:
                file.write_text("")
            for events in self.path.glob("events.out.tfevents.*"):
                events.unlink()
            (self.path / "config.json").write_text(json.dumps(config, indent=1))

    def resumable(self) -> bool:
        """Whether `resume` would find a state of this very run."""
        try:
            self._state()
        except TokenGameError:
            return False
        return True

    def resume(self) -> dict[str, Any]:
        """The state that was saved last; what was recorded after it is cut off.

        Raises:
            TokenGameError: no checkpoint, a damaged one, or one of another run.
        """
        state = self._state()
        for file in self.files if self.main else ():
            lines = file.read_text().splitlines()[: state["step"]]
            write_whole(file, "".join(line + "\n" for line in lines))
        return state

    def _state(self) -> dict[str, Any]:
        if not self.checkpoint.is_file():
            raise TokenGameError(f"nothing to resume: no checkpoint at {self.checkpoint}; run without --resume")
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError):
            raise TokenGameError(f"checkpoint {self.checkpoint} is damaged; run without --resume") from None
        if state.get("run") != self.identity or "step" not in state or not self.files[1].is_file():
            raise TokenGameError(
                f"{self.checkpoint} is of other settings, weights or images, or of an older version; "
                "resume with those, or run without --resume"
            )
        return state

    @contextmanager
    def recorder(self, step: int) -> Iterator[Callable[[int, Metrics], None]]:
        """A function that records the metrics of a step after `step`; times are told by their names."""
        if not self.main:
            yield lambda _step, _metrics: None
            return
        metrics_file, timings_file = self.files
        with (
            SummaryWriter(str(self.path), purge_step=step + 1) as board,
            metrics_file.open("a", buffering=1) as metrics_log,  # a line at a time
            timings_file.open("a", buffering=1) as timings_log,
        ):

            def record(step: int, metrics: Metrics) -> None:
                for name, value in metrics.items():
                    board.add_scalar(name, value, step)
                times = {name: value for name, value in metrics.items() if name.startswith("time/")}
                others = {name: value for name, value in metrics.items() if name not in times}
                timings_log.write(json.dumps({"update": step, **times}) + "\n")
                metrics_log.write(json.dumps({"update": step, **others}) + "\n")

            yield record

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint whole or not at all; by then the lines of all `step`s it counts are in the files."""
        if self.main:
            part = self.checkpoint.with_suffix(".part")
            torch.save({"run": self.identity, **state}, part)
            os.replace(part, self.checkpoint)

    def metrics(self) -> list[Metrics]:
        """What was recorded, a dictionary a step."""
        return [json.loads(line) for line in self.files[0].read_text().splitlines()]

    def timings(self) -> list[Metrics]:
        """Likewise the times."""
        return [json.loads(line) for line in self.files[1].read_text().splitlines()]
