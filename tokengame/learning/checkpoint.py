"""What a training run leaves on disk, so that it can be watched, interrupted at any moment, and resumed.

`metrics.jsonl` is repeatable: a run that was killed and resumed ends with the same bytes as one that was not. Times go
to `timings.jsonl`, both to TensorBoard where that is installed (`pip install tokengame[train]`). Of several processes
the first one writes.

A checkpoint ends with the SHA-256 of its own bytes, and names length and SHA-256 of both logs, so that a resumed run
continues from exactly what was written or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from tokengame.errors import TokenGameError, first_line
from tokengame.files import append, require_writable, sync, whole, write_whole, writing

Metrics = dict[str, float]

SEAL = b"\ntokengame checkpoint, sha256 "
"""what follows the bytes of `torch.save`, before the digest in hexadecimal"""


def require_new(log: Path, *products: Path) -> None:
    """Refuse to begin where an earlier run has left something.

    Args:
        log: the folder of the run.
        products: files that it writes at the end.

    Raises:
        TokenGameError: one of them is there, a checkpoint, or metrics.
    """
    for path in (*products, log / "checkpoint.pt", log / "metrics.jsonl"):
        if path.is_file() and path.stat().st_size:
            raise TokenGameError(
                f"{path} is of an earlier run; continue that with --resume, replace it with --overwrite, or choose "
                "another --output"
            )


class Log:
    """A file of JSON lines that only grows."""

    def __init__(self, path: Path):
        self.path, self.size, self.digest = path, 0, hashlib.sha256()

    def clear(self) -> None:
        """Begin anew."""
        write_whole(self.path, "")
        self.size, self.digest = 0, hashlib.sha256()

    def append(self, line: dict[str, Any]) -> None:
        """Write one line."""
        data = (json.dumps(line) + "\n").encode()
        append(self.path, data)
        self.size += len(data)
        self.digest.update(data)

    def mark(self) -> list[Any]:
        """Length and digest of what is written, which is on the disk from then on."""
        sync(self.path)
        return [self.size, self.digest.hexdigest()]

    def read(self) -> list[dict[str, Any]]:
        """All lines.

        Raises:
            TokenGameError: the file is missing or damaged.
        """
        try:
            return [json.loads(line) for line in self.path.read_bytes().splitlines()]
        except (OSError, ValueError) as error:
            raise TokenGameError(f"{self.path} cannot be read ({first_line(error)})") from None

    def find(self, mark: list[Any]) -> bytes:
        """What the file held when it was marked.

        Raises:
            TokenGameError: it does not hold that any more.
        """
        data = self.path.read_bytes()[: mark[0]] if self.path.is_file() else b""
        if [len(data), hashlib.sha256(data).hexdigest()] != mark:
            raise TokenGameError(
                f"{self.path} is missing or damaged: it does not hold what the checkpoint beside it counts; delete "
                f"{self.path.parent}, or choose another --output"
            )
        return data

    def cut(self, mark: list[Any]) -> None:
        """Go back to where the file was marked."""
        data = self.find(mark)
        with writing(self.path):
            os.truncate(self.path, len(data))
        self.size, self.digest = len(data), hashlib.sha256(data)


class Board:
    """TensorBoard's events. Its own writer has a thread, in which errors get lost; this one writes at once.

    Args:
        folder: for the file.
        step: after which it begins; what an earlier file holds of later steps is not shown any more.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{step}"
        self.path = folder / name
        write_whole(self.path, b"")
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=step + 1, file_version="brain.Event:2"), Event(step=step + 1, session_log=start))

    def add(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(buffer).write(event.SerializeToString())
        append(self.path, buffer.getvalue())


class RunFolder:
    """The folder of one run: config.json, metrics.jsonl, timings.jsonl, checkpoint.pt, and events of TensorBoard.

    Args:
        path: the folder.
        identity: of the run; only a checkpoint with the same identity is resumed.
        main: whether this process writes.
    """

    def __init__(self, path: Path, identity: str, main: bool = True):
        self.path, self.identity, self.main = path, identity, main
        self.checkpoint, self.config = path / "checkpoint.pt", path / "config.json"
        self.logs = {name: Log(path / f"{name}.jsonl") for name in ("metrics", "timings")}
        require_writable(self.checkpoint, self.config, *(log.path for log in self.logs.values()))
        self._seen: bytes | None = None
        """the digest of the checkpoint that was loaded or written last"""

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.path / "lock")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """In this context no other process runs here; the system releases the lock of a process that was killed.

        Raises:
            TokenGameError: another one does.
        """
        if not self.main:
            yield
            return
        with writing(self.path / "lock"):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise TokenGameError(
                    f"another run is writing to {self.path}; wait until it ends, or choose another --output"
                ) from None
        try:
            yield
        finally:
            self._lock.release()

    def start(self, config: dict[str, Any]) -> None:
        """Delete what an earlier run left."""
        if self.main:
            with writing(self.path):
                for old in (self.checkpoint, *self.path.glob("events.out.tfevents.*")):
                    old.unlink(missing_ok=True)
            for log in self.logs.values():
                log.clear()
            self._describe(config)

    def go_on(self, config: dict[str, Any], marks: dict[str, Any]) -> None:
        """Cut off what was recorded after the checkpoint, whose state names `marks` of the logs.

        Raises:
            TokenGameError: another run has written here since.
        """
        if self.main:
            if self._seal() != self._seen:
                raise TokenGameError(f"another run has gone on in {self.path} meanwhile; run the command again")
            for name, log in self.logs.items():
                log.cut(marks[name])
            self._describe(config)

    def _describe(self, config: dict[str, Any]) -> None:
        write_whole(self.config, json.dumps(config, indent=1, default=str) + "\n")

    def load(self) -> dict[str, Any]:
        """The state that was saved last.

        Raises:
            TokenGameError: no checkpoint, a damaged one, one of another run, or logs that do not belong to it.
        """
        if not self.checkpoint.is_file():
            raise TokenGameError(f"nothing to resume: no checkpoint at {self.checkpoint}; run without --resume")
        anew = f"delete {self.path}, or choose another --output"
        self._seen = self._seal()
        if self._seen is None:
            raise TokenGameError(f"{self.checkpoint} is cut off, or no checkpoint of this version of tokengame; {anew}")
        if self._seen != self._digest():
            raise TokenGameError(f"checkpoint {self.checkpoint} is damaged; {anew}")
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            run, marks = state["run"], state["logs"]
            if self.main and run == self.identity:
                for name, log in self.logs.items():
                    log.find(marks[name])
        except TokenGameError:
            raise
        except Exception as error:  # sealed, but not by `save`
            raise TokenGameError(f"{self.checkpoint} is no checkpoint ({first_line(error)}); {anew}") from None
        if run != self.identity:
            raise TokenGameError(
                f"{self.checkpoint} is of other settings, weights or images, or of an older version; "
                f"resume with those, or choose another --output"
            )
        return state

    def _seal(self) -> bytes | None:
        """The digest at the end of the checkpoint; None where there is none."""
        length = len(SEAL) + 64
        try:
            with self.checkpoint.open("rb") as file:
                file.seek(-length, os.SEEK_END)
                end = file.read()
        except OSError:  # missing, or shorter
            return None
        return end[len(SEAL) :] if end.startswith(SEAL) else None

    def _digest(self) -> bytes:
        """Of all before the seal."""
        with (
            self.checkpoint.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
            view[: -len(SEAL) - 64] as payload,
        ):
            return hashlib.sha256(payload).hexdigest().encode()

    def recorder(self, step: int) -> Callable[[int, Metrics], None]:
        """A function that records the metrics of a step after `step`; times are those named "time/..."."""
        if not self.main:
            return lambda _step, _metrics: None
        try:
            board = Board(self.path, step)
        except ImportError:  # the same numbers are in the other two files
            board = None

        def record(step: int, metrics: Metrics) -> None:
            times = {name: value for name, value in metrics.items() if name.startswith("time/")}
            others = {name: value for name, value in metrics.items() if name not in times}
            if board is not None:
                board.add(step, metrics)
            self.logs["timings"].append({"update": step, **times})
            self.logs["metrics"].append({"update": step, **others})

        return record

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint whole or not at all; the lines of all its steps must be in the logs by then."""
        if not self.main:
            return
        marks = {name: log.mark() for name, log in self.logs.items()}
        with whole(self.checkpoint) as part:
            with part.open("wb") as file:
                torch.save({"run": self.identity, "logs": marks, **state}, file)
            with part.open("rb") as file:
                seal = hashlib.file_digest(file, "sha256").hexdigest().encode()
            with part.open("ab") as file:
                file.write(SEAL + seal)
        self._seen = seal

    def metrics(self) -> list[Metrics]:
        """The recorded metrics, a dictionary a step."""
        return self.logs["metrics"].read()

    def timings(self) -> list[Metrics]:
        """The recorded times, a dictionary a step."""
        return self.logs["timings"].read()
