"""Images below a folder, or in the files and folders that a pattern fits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from PIL import Image

from tokengame.data.decode import counted, is_image, open_image, printable
from tokengame.errors import TokenGameError
from tokengame.files import Progress, silent

MANY = 100
"""entries of a folder from which on looking through them is worth a progress bar"""
LINKS = 2
"""links to folders that are followed one inside the other"""


def hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot, or is a folder that macOS or Synology puts beside images."""
    return any(part in ("__MACOSX", "@eaDir") or (part[:1] == "." and part != ".") for part in name.split("/"))


class FolderImages:
    """Files below a folder."""

    own_labels = None
    """labels come from folders alone"""
    labels: list[int] | None = None

    def __init__(self, root: Path, files: Sequence[str], notes: Sequence[str] = ()):
        self.root, self.files, self.notes = root, list(files), list(notes)
        self.names = [printable(name) for name in files]

    def open(self, index: int) -> Image.Image:
        return open_image(self.root / self.files[index])

    def keep(self, chosen: Sequence[int]) -> None:
        """Leave all other images out."""
        self.files = [self.files[i] for i in chosen]
        self.names = [self.names[i] for i in chosen]


def images_below(root: Path, watch: Progress = silent) -> FolderImages:
    """Images anywhere below `root`, sorted by their paths from there; hidden files and folders are left out.

    Raises:
        OSError: a folder cannot be read.
    """
    top = str(root)
    first: Iterable[os.DirEntry[str]] = sorted(os.scandir(top), key=lambda entry: entry.name)
    count = len(list(first))
    if count > MANY:
        first = watch(first, f"looking for images in {printable(root.name)}", count)
    above, dropped = frozenset([_identity(top)]), list[str]()
    found = chain.from_iterable(_files(entry, above, dropped) for entry in first)
    names = sorted(os.path.relpath(path, top) for path in found if is_image(path))
    return FolderImages(root, names, _left_out(dropped))


def _files(entry: os.DirEntry[str], above: frozenset, dropped: list[str]) -> Iterator[str]:
    """Files at or below `entry`; links are followed, but not back up, so that the search ends.

    Args:
        above: the folders that `entry` lies in.
        dropped: gets the links that lead nowhere, or through too many others.
    """
    stack = [(entry, above, 0)]
    while stack:
        entry, above, links = stack.pop()
        links += entry.is_symlink()
        if hidden(entry.name):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            own = _identity(entry.path)
            if own in above:
                continue
            if links > LINKS:
                dropped.append(entry.path)
                continue
            with os.scandir(entry.path) as entries:
                stack += [(inner, above | {own}, links) for inner in entries]
        elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
            yield entry.path
        elif entry.is_symlink():
            dropped.append(entry.path)


def _identity(folder: str) -> tuple[int, int]:
    """The same for every path to a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _left_out(dropped: list[str]) -> list[str]:
    if not dropped:
        return []
    return [f"{counted(len(dropped), 'link')} not followed, the first is {printable(min(dropped))}"]


def fitting(pattern: str, paths: Sequence[str], watch: Progress = silent) -> FolderImages:
    """The images that `paths` are or hold, named from the folder that all lie in.

    Raises:
        TokenGameError: one is neither a folder nor an image.
        OSError: a folder cannot be read.
    """
    whole = [os.path.abspath(path) for path in paths]
    root, names, notes = os.path.commonpath([os.path.dirname(path) for path in whole]), list[str](), list[str]()
    for path in whole:
        if not os.path.isdir(path) and not is_image(path):
            raise TokenGameError(f"{pattern} fits {printable(path)}, which is neither a folder nor an image")
        below = images_below(Path(path), watch) if os.path.isdir(path) else FolderImages(Path(path).parent, [])
        files = below.files if os.path.isdir(path) else [os.path.basename(path)]
        names += [os.path.relpath(below.root / name, root) for name in files if not hidden(name)]
        notes += below.notes
    return FolderImages(Path(root), sorted(set(names)), notes)
