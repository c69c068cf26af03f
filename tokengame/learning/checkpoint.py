"""What a training run leaves on disk, so that it can be watched, interrupted at any moment, and resumed.

`metrics.jsonl` is repeatable: a run that was killed and resumed ends with the same bytes as one that was not. Times go
to `timings.jsonl`, both to TensorBoard. Of several processes the first one writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from tokengame.errors import TokenGameError
from tokengame.files import require_writable, write_whole

Metrics = dict[str, float]


class RunFolder:
    """The folder of one run: config.json, metrics.jsonl, timings.jsonl, TensorBoard events, checkpoint.pt.

    Args:
        path: the folder.
        identity: of the run; only a checkpoint with the same identity is resumed.
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
        """Of metrics and of timings."""
        return self.path / "metrics.jsonl", self.path / "timings.jsonl"

    def start(self, config: dict[str, Any]) -> None:
        """Delete what an earlier run left."""
        if self.main:
            self.checkpoint.unlink(missing_ok=True)
            for file in self.files:
                file.write_text("")
            for events in self.path.glob("events.out.tfevents.*"):
                events.unlink()
            (self.path / "config.json").write_text(json.dumps(config, indent=1))

    def resumable(self) -> bool:
        """Whether `resume` would find a state of this run."""
        try:
            self._state()
        except TokenGameError:
            return False
        return True

    def resume(self) -> dict[str, Any]:
        """The state that was saved last; metrics recorded after it are cut off.

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
        """A function that records the metrics of a step after `step`; times are those named "time/..."."""
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
        """Write the checkpoint whole or not at all; the lines of all its steps must be in the files by then."""
        if self.main:
            part = self.checkpoint.with_suffix(".part")
            torch.save({"run": self.identity, **state}, part)
            os.replace(part, self.checkpoint)

    def metrics(self) -> list[Metrics]:
        """The recorded metrics, a dictionary a step."""
        return [json.loads(line) for line in self.files[0].read_text().splitlines()]

    def timings(self) -> list[Metrics]:
        """The recorded times, a dictionary a step."""
        return [json.loads(line) for line in self.files[1].read_text().splitlines()]
