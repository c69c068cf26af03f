"""Writing files, each whole or not at all, and the interface of progress bars."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokengame.errors import TokenGameError

Description = str | Callable[[], str]
"""what a progress bar says; a function is called again at every step"""
Progress = Callable[[Iterable, Description, int], Iterable]
"""Wraps an iterable, with a description and its length, in a progress bar."""
Note = Callable[[str], None]
"""Takes a sentence for the user: what was found, and what was made of it."""
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
HIDDEN = re.compile(r"I/O error|\(os error \d+\)|inline_container|PytorchStreamWriter|iostream error")
"""in the text of other exceptions that safetensors and PyTorch raise where writing fails"""


def silent(iterable: Iterable, _description: Description, _total: int) -> Iterable:
    """A `Progress` that shows nothing."""
    return iterable


def unsaid(_sentence: str) -> None:
    """A `Note` that says nothing."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all, with the permissions of the user's umask.

    Yields:
        A part file beside `path` for the block to write. It replaces `path` when the block ends (of a link, its
        target) and is removed when the block fails.

    Raises:
        TokenGameError: the file cannot be written; the old one is as it was.
    """
    target = _target(Path(path))
    part = target.with_name(target.name + ".part")
    with writing(target):
        try:
            part.unlink(missing_ok=True)  # of a process that was killed
            part.touch(exist_ok=False)
            mode = stat.S_IMODE(part.stat().st_mode)
            yield part
            part.chmod(mode)  # some libraries write files that only the user may read
            _sync(part)
            os.replace(part, target)
            _sync(target.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the file whole or not at all; text in UTF-8."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    with whole(path) as part:
        part.write_bytes(data)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows that have the same keys; lists and dicts become JSON in a cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    write_whole(path, text.getvalue())


def append(path: Path, data: bytes) -> None:
    """Add `data` to a file that exists.

    Raises:
        TokenGameError: it cannot be written; a part of `data` may be.
    """
    existing = os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0)  # a folder that was deleted must be noticed
    with writing(path), open(path, "ab", opener=lambda name, _: os.open(name, existing)) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Wait until the file is on the disk.

    Raises:
        TokenGameError: it cannot be written.
    """
    with writing(path):
        _sync(path)


def require_writable(*paths: Path) -> None:
    """Raise TokenGameError now, not after hours, if one of these files could not be written; makes their folders."""
    for path in paths:
        target = _target(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _probe(target.with_name(f"{target.name}.{os.getpid()}.probe"))
        except OSError as error:
            files = [folder for folder in path.parents if folder.exists() and not folder.is_dir()]
            reason = f"{files[0]} is no folder" if files else error.strerror
            raise TokenGameError(f"cannot write {path} ({reason}); choose another place with --output") from None


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


def _probe(path: Path) -> None:
    """Write a file and remove it, interrupted or not."""
    try:
        path.touch()
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """In this context an error of the system means that `path` cannot be written: one sentence."""
    before = sys.exc_info()[1]  # while which this is written
    try:
        yield
    except TokenGameError:
        raise
    except Exception as error:
        stopped = _first(error)
        if isinstance(stopped, KeyboardInterrupt) and stopped is not before:  # behind an error of PyTorch's writer
            raise stopped from None
        if not isinstance(error, OSError) and not HIDDEN.search(str(error)):
            raise
        number = _number(error)
        reason = os.strerror(number) if number else "only a part of it was written"
        what = "free some space there" if number in (*NO_SPACE, None) else "mend that or choose another --output"
        raise TokenGameError(f"cannot write {path} ({reason}); {what}, then run the command again") from None


def _first(error: BaseException) -> BaseException:
    """What was raised first, while handling which `error` was."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _number(error: BaseException | None) -> int | None:
    """The system's number of an error, which may be only in the text or the context of another one."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else _number(error.__context__)


def _target(path: Path) -> Path:
    """The regular file, there or not yet, that is written for `path`: of a link, what it points to.

    Raises:
        TokenGameError: something else lies there.
    """
    if os.path.isdir(path) or not path.name:
        raise TokenGameError(f"{path} is a folder; give the name of a file in it with --output")
    if os.path.exists(path) and not os.path.isfile(path):
        raise TokenGameError(f"{path} is a device, a pipe or a socket; give the name of a file with --output")
    target = Path(os.path.realpath(path))
    if os.path.islink(target):
        raise TokenGameError(f"{path} is a link that leads to itself; give the name of a file with --output")
    return target


def _sync(path: Path) -> None:
    """fsync a file or, where the system has that, a folder."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)
