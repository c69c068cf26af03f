"""Images in uncompressed tars, read in place; in WebDataset shards, a photo of each sample and its class."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tokengame.data.decode import EXTENSIONS, MAX_BYTES, is_image, open_image, printable
from tokengame.data.folders import hidden
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Progress, silent

COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
              b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}  # fmt: skip
"""first bytes of files that cannot be read in place"""
TAIL = 2**20
"""bytes behind the last member that are looked through for lost ones"""


class TarImages:
    """Members of uncompressed tars, read in place; each process opens the files for itself.

    Members with the same key, the name up to the first dot of its last part, make a sample, as in WebDataset shards.
    Members ending in .cls hold the class index of their sample. Links are read as what they lead to in the same tar.

    Args:
        paths: tars.
        watch: shows progress while members are looked up.

    Raises:
        TokenGameError: one is no uncompressed tar, or damaged.
    """

    label_origin: str = "their .cls members"
    class_names: Sequence[str] | None = None

    def __init__(self, paths: Sequence[Path], watch: Progress = silent):
        found, left_out = list[_Photo](), _LeftOut()
        for path in watch(paths, "looking up images in", len(paths)):
            found += _photos(_read_index(path, left_out), left_out)
        self.notes = left_out.notes()
        self._keep(sorted(found, key=lambda photo: (photo.path, photo.name)))
        labels = [photo.label for photo in self._photos]
        self.own_labels: Sequence[Any] | None = labels if any(label is not None for label in labels) else None
        complete = [label for label in labels if label is not None]
        self.labels: list[int] | None = complete if labels and len(complete) == len(labels) else None

    def open(self, index: int) -> Image.Image:
        photo = self._photos[index]
        return open_image(_read_span(photo.path, photo.start, min(photo.size, MAX_BYTES + 1)))

    def keep(self, chosen: Sequence[int]) -> None:
        """Leave all other images out."""
        self._keep([self._photos[i] for i in chosen])

    def _keep(self, photos: list[_Photo]) -> None:
        self._photos = photos
        self.files = [photo.name for photo in photos]
        self.names = [printable(name) for name in self.files]


@dataclass(frozen=True)
class _Photo:
    path: Path
    name: str
    start: int
    size: int
    label: int | None


@dataclass
class _LeftOut:
    """Members and tars that are not read as one might expect."""

    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """A sentence for each kind."""
        kinds = {
            "link that leads to no file in the tar left out": self.links,
            "image left out that belongs to the sample of another": self.images,
            ".cls member left out that has another dot in its name": self.labels,
            "tar without a mark of its end, perhaps cut short": self.unfinished,
        }
        return [
            f"{len(names):,} x {kind}, the first is {printable(names[0])}" for kind, names in kinds.items() if names
        ]


@dataclass
class _Index:
    """What one tar holds, by names without `.` and `..`."""

    path: Path
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """first byte and size"""
    links: dict[str, str] = field(default_factory=dict)
    """the member that a link leads to; outside the tar it is none"""
    classes: dict[str, bytes] = field(default_factory=dict)
    """what .cls members hold"""

    def target(self, name: str) -> str | None:
        """The file that a member is or leads to, if there is one."""
        passed = set[str]()
        while name in self.links and name not in passed:
            passed.add(name)
            name = self.links[name]
        return name if name in self.files else None


class _Bounded(io.BufferedReader):
    """A file of which no more is ever allocated than there is, whatever a header claims."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(max(0, min(size or 0, self.size - self.tell())))


def _read_index(path: Path, left_out: _LeftOut) -> _Index:
    index = _Index(path)
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _enter(member, archive, index, file.size)
            if not _marked_end(file, archive.offset):
                left_out.unfinished.append(path.name)
    except Exception as error:  # tarfile raises whatever it meets in damaged headers
        raise TokenGameError(_complaint(path, error)) from None
    return index


def _enter(member: tarfile.TarInfo, archive: tarfile.TarFile, index: _Index, total: int) -> None:
    """Add a member, in place of an earlier one of the same name, as unpacking would."""
    name = posixpath.normpath(member.name).lstrip("/")
    if member.size < 0 or (member.isreg() and member.offset_data + member.size > total):
        raise ValueError(f"{printable(name)} is said to have {member.size:,} bytes, more than there are")
    index.files.pop(name, None)
    index.links.pop(name, None)
    if member.issparse():
        raise ValueError(f"{printable(name)} is stored as a sparse file")
    if member.isreg():
        index.files[name] = member.offset_data, member.size
        if _extension(name) == "cls":
            content = archive.extractfile(member)
            index.classes[name] = b"" if content is None else content.read(64)
    elif member.islnk():
        index.links[name] = posixpath.normpath(member.linkname).lstrip("/")
    elif member.issym():
        # an absolute target stays absolute and one outside keeps its "..": no member has such a name
        index.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))


def _marked_end(file: _Bounded, end: int) -> bool:
    """Whether the mark of the end is where tarfile stopped.

    Raises:
        ValueError: members may follow: tarfile takes a damaged header, and the mark between joined tars, for the end.
    """
    file.seek(end)
    tail = file.read(TAIL)
    if tail.strip(b"\0"):
        raise ValueError(f"there is more behind byte {end:,}, where a header is damaged or another tar was appended")
    return len(tail) >= tarfile.BLOCKSIZE


def _complaint(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        return f"{path} is compressed ({kind}): unpack it, or pack it as a plain .tar, which is read in place"
    return f"{path} is not a readable uncompressed tar file ({first_line(error)})"


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _extension(name: str) -> str:
    """All behind the first dot, as WebDataset has it."""
    return posixpath.basename(name).partition(".")[2].lower()


def _photos(index: _Index, left_out: _LeftOut) -> Iterator[_Photo]:
    members = [name for name in (*index.files, *index.links) if not hidden(name)]
    folders = {posixpath.dirname(name) for name in index.files}
    samples: dict[str, list[str]] = {}
    for name in members:
        if index.target(name) is not None:
            samples.setdefault(_key(name), []).append(name)
        elif is_image(name) or index.links[name] in folders:
            left_out.links.append(name)
    classes = {_key(n): _class_index(index, n) for names in samples.values() for n in names if _extension(n) == "cls"}
    left_out.labels += [name for name in members if _extension(name).endswith(".cls")]
    for key, names in samples.items():
        photos = _photos_of_sample(names, bool(classes))
        left_out.images += [name for name in names if is_image(name) and name not in photos]
        for name in photos:
            yield _Photo(index.path, name, *index.files[index.target(name) or ""], classes.get(key))


def _photos_of_sample(names: list[str], shard: bool) -> list[str]:
    """Those of the members with one key that are photos, not masks or other views of one.

    In shards, and beside a .json, .txt or the like, one. Elsewhere dots are part of many names: of cat.jpg, cat.1.jpg
    and cat.seg.png only the last is left out.
    """
    images = [name for name in names if is_image(name)]
    plain = [name for name in images if "." not in _extension(name)]
    if shard or any("." not in _extension(name) for name in names if name not in images):
        return sorted(plain or images, key=lambda n: (EXTENSIONS.index(posixpath.splitext(n)[1].lower()), n))[:1]
    return [name for name in images if not plain or name in plain or _extension(name).rpartition(".")[0].isdigit()]


def _class_index(index: _Index, name: str) -> int:
    text = index.classes.get(index.target(name) or "", b"")
    if not re.fullmatch(rb"\s*[+-]?[0-9]+\s*", text):
        raise TokenGameError(f"{printable(name)} in {index.path} holds no class index but {text[:20]!r}")
    return int(text)


def _read_span(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)
