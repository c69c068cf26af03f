"""Writing files, and the interface of progress bars."""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokengame.errors import TokenGameError

Progress = Callable[[Iterable, str, int], Iterable]
"""Wraps an iterable, with a description and its length, in a progress bar."""


def silent(iterable: Iterable, _description: str, _total: int) -> Iterable:
    """A `Progress` that shows nothing."""
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


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows that have the same keys; lists and dicts become JSON in a cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})


def require_file(path: str | Path, what: str) -> int:
    """The size in bytes of the regular file `path`, which is `what`; links are followed, and nothing is opened.

    Raises:
        TokenGameError: there is none, it is empty, or it is a folder, a pipe or a device, which could block.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise TokenGameError(f"no {what} at {path}") from None
    except OSError as error:
        raise TokenGameError(f"cannot read {what} {path} ({error.strerror})") from None
    if stat.S_ISDIR(found.st_mode):
        raise TokenGameError(f"{path} is a folder, not a {what}")
    if not stat.S_ISREG(found.st_mode):
        raise TokenGameError(f"{path} is a pipe, a socket or a device, not a {what}")
    if not found.st_size:
        raise TokenGameError(f"{what} {path} is empty")
    return found.st_size
