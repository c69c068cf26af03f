"""Where images come from: a folder of class folders, a .tar of the same, a Hugging Face data set, embedded scenes.

A source knows the name and label of each image and opens any of them. Only a stream cannot.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from braceexpand import braceexpand
from PIL import Image

from tokengame.data.hub import HuggingFaceImages, HuggingFaceStream
from tokengame.data.scenes import FashionScenes, load_photos
from tokengame.errors import TokenGameError
from tokengame.files import Progress, silent

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MANY = 100
"""entries of a folder from which on looking through them is worth a progress bar"""
EMBEDDED_SCENES = {
    "fashion": ("test", 1000, 1),
    "fashion-val": ("test", 5000, 3),
    "fashion-train": ("train", 20000, 0),
}
"""split of the photos, number of scenes, seed; "NAME:FOLDER": a scene of each photo of the whole Fashion-MNIST there"""


class ImageSet(Protocol):
    """A set of images that can be learned from."""

    names: list[str]
    """one per image, for messages; of a stream one in all"""
    labels: list[int] | None
    """one per image, as the model's class indices; None where unknown; empty where a stream's rows bring them"""


class ImageSource(ImageSet, Protocol):
    """Images that can be opened in any order."""

    def open(self, index: int) -> Image.Image: ...


@dataclass
class FolderImages:
    """Files below a folder."""

    root: Path
    names: list[str]
    labels: list[int] | None = None

    def open(self, index: int) -> Image.Image:
        return Image.open(self.root / self.names[index])


class TarImages:
    """Members of uncompressed tars, read in place; each process opens the files for itself.

    Labels come from members of the same name ending in .cls that hold a class index, as in WebDataset shards.
    `watch` shows progress while members are looked up.
    """

    def __init__(self, paths: Sequence[Path], watch: Progress = silent):
        found: list[tuple[str, Path, int, int]] = []
        self.classes: dict[str, int] = {}
        """what .cls members say, by file and name"""
        for path in watch(paths, "looking up images in", len(paths)):
            found += self._index(path)
        found.sort(key=lambda image: (image[1], image[0]))
        self.names = [name for name, *_ in found]
        self._spans = [(path, start, size) for _, path, start, size in found]
        keys = [f"{path}:{name.rsplit('.', 1)[0]}" for name, path, *_ in found]
        self.labels: list[int] | None = [self.classes[k] for k in keys] if self.classes.keys() >= set(keys) else None

    def _index(self, path: Path) -> Iterator[tuple[str, Path, int, int]]:
        """Name, file, first byte and size of each image of one tar; its class indices go to `classes`."""
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem, _, suffix = member.name.rpartition(".")
                    if member.isfile() and f".{suffix.lower()}" in EXTENSIONS:
                        yield member.name, path, member.offset_data, member.size
                    elif member.isfile() and suffix == "cls":
                        self.classes[f"{path}:{stem}"] = _number(archive, member, path)
        except (tarfile.TarError, OSError) as error:
            raise TokenGameError(f"{path} is not a readable uncompressed tar file ({error})") from None

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(_read_span(*self._spans[index])))


def _number(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = archive.extractfile(member)
    assert file is not None
    text = file.read()
    try:
        return int(text)
    except ValueError:
        raise TokenGameError(f"{member.name} in {path} holds no class index but {text[:20]!r}") from None


def _read_span(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


class SceneImages:
    """The embedded fashion scenes as a source."""

    def __init__(self, scenes: FashionScenes):
        self.scenes = scenes
        self.names = [f"scene {i}" for i in range(len(scenes))]
        self.labels: list[int] | None = [scenes.label(i) for i in range(len(scenes))]

    def open(self, index: int) -> Image.Image:
        return self.scenes[index].image


@dataclass
class Subset:
    """Some images of a source."""

    source: ImageSource
    chosen: Sequence[int]

    def __post_init__(self):
        self.names = [self.source.names[i] for i in self.chosen]
        labels = self.source.labels
        self.labels = None if labels is None else [labels[i] for i in self.chosen]

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.chosen[index])


STREAM = "stream:"


def open_images(location: str, split: str = "train", watch: Progress = silent) -> ImageSource | HuggingFaceStream:
    """The images at `location`.

    Args:
        location: "fashion" (1,000 embedded scenes), "fashion-val" (5,000 of the same photos) or "fashion-train"
            (20,000 of other photos); "fashion:FOLDER" and so on make one scene of each photo of the Fashion-MNIST in
            FOLDER; a folder; a tar; tar shards, as "train-{0000..0127}.tar" or "shards/*.tar"; or the name of a Hugging
            Face data set, after "stream:" to learn from it while it arrives.
        split: of a Hugging Face data set.
        watch: shows progress where many folders or shards are looked through.

    Raises:
        TokenGameError: nothing there, or no image in it.
    """
    path = Path(location)
    source: ImageSource
    if location.partition(":")[0] in EMBEDDED_SCENES:
        return SceneImages(_scenes(*location.partition(":")[::2]))
    if location.startswith(STREAM):
        return HuggingFaceStream(location.removeprefix(STREAM), split)
    if path.is_dir():
        names = _files(path, watch)
        source = FolderImages(path, names)
    elif path.is_file():
        source = TarImages([path])
    elif path.suffix == ".tar" and set(location) & set("*?{"):
        source = TarImages(_shards(location), watch)
    elif path.suffix in (".tar", ".zip", ".gz") or location.startswith((".", "/", "~")) or location.count("/") > 1:
        raise TokenGameError(f"no folder or tar file at {location}")
    else:
        return HuggingFaceImages(location, split)
    if not source.names:
        raise TokenGameError(f"no image in {location} (looked for {', '.join(sorted(EXTENSIONS))})")
    return source


def _scenes(name: str, folder: str) -> FashionScenes:
    """Embedded scenes by name, or one of every photo of the Fashion-MNIST in `folder`.

    Raises:
        TokenGameError: it is not there.
    """
    split, count, seed = EMBEDDED_SCENES[name]
    if not folder:
        return FashionScenes(split, count, seed=seed)
    try:
        photos = load_photos(split, folder)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TokenGameError(f"no Fashion-MNIST (its four .gz files) in {folder} ({error})") from None
    return FashionScenes(split, len(photos.labels), seed=seed, photos=photos)


def _files(root: Path, watch: Progress) -> list[str]:
    """Images anywhere below `root`, by their paths from there, sorted."""
    first = sorted(root.iterdir())
    many = watch(first, f"looking for images in {root.name}", len(first)) if len(first) > MANY else first
    found = chain.from_iterable(entry.rglob("*") if entry.is_dir() else [entry] for entry in many)
    return sorted(str(f.relative_to(root)) for f in found if f.suffix.lower() in EXTENSIONS and f.is_file())


def _shards(pattern: str) -> list[Path]:
    """The files that a pattern of braces ({a..b}) and wildcards (*, ?) means, sorted.

    Raises:
        TokenGameError: one that braces name is missing, or no file fits.
    """
    paths: list[Path] = []
    for name in braceexpand(pattern):
        fitting = [name] if not set(name) & set("*?[") else sorted(glob(name))
        missing = [path for path in fitting if not Path(path).is_file()]
        if missing or not fitting:
            raise TokenGameError(f"no tar file at {missing[0] if missing else name}, which {pattern} names")
        paths += map(Path, fitting)
    return paths


def label_images(source: ImageSet, class_map: str | None, classes: int) -> None:
    """Label the images of a folder or tar with the model's class indices, where that can be done.

    Class folders are matched by name with the lines of the file `class_map`; without one, sorted folders are the
    classes if there are exactly `classes` of them, and else the images stay unlabelled. A data set's own labels stay.

    Raises:
        TokenGameError: `class_map` is missing, names too many classes, or does not know a class folder.
    """
    if isinstance(source, HuggingFaceStream):
        if (source.classes or 0) > classes:
            raise TokenGameError(f"{source.name} has {source.classes} classes but the model has {classes}")
        return
    folders = [Path(name).parent.name for name in source.names]
    if isinstance(source, HuggingFaceImages) or (isinstance(source, TarImages) and source.classes):  # its own
        if source.labels is not None and not all(isinstance(i, int) and 0 <= i < classes for i in source.labels):
            raise TokenGameError(f"the labels that come with {source.names[0]} are not class indices below {classes}")
        return
    if not any(folders):
        if class_map is not None:
            raise TokenGameError("--class-map needs class folders, and these images lie in none")
        return
    if class_map is None:
        known = {folder: index for index, folder in enumerate(sorted(set(folders)))}
        source.labels = [known[f] for f in folders] if len(known) == classes else None
        return
    if not Path(class_map).is_file():
        raise TokenGameError(f"no class map at {class_map}; it is a text file with one class name a line")
    index = {line.strip(): i for i, line in enumerate(Path(class_map).read_text().splitlines()) if line.strip()}
    strange = sorted({f for f in folders if f not in index})
    if strange:
        raise TokenGameError(
            f"{len(strange)} class folders are not in {class_map}, among them {strange[0]!r}: rename or add them"
        )
    if max(index.values()) >= classes:
        raise TokenGameError(f"{class_map} names {max(index.values()) + 1} classes but the model has {classes}")
    source.labels = [index[f] for f in folders]


@overload
def split_images(source: ImageSource, holdout: float, seed: int) -> tuple[Subset, Subset]: ...
@overload
def split_images(
    source: ImageSource | HuggingFaceStream, holdout: float, seed: int
) -> tuple[ImageSet, ImageSource]: ...


def split_images(source: ImageSource | HuggingFaceStream, holdout: float, seed: int) -> tuple[ImageSet, ImageSource]:
    """Seeded random parts for training and validation, `holdout` (a share) held back; at least one image in each.

    Of a stream its first images are held back, whatever `holdout` says.
    """
    if isinstance(source, HuggingFaceStream):
        return source.split()
    if not 0 < holdout < 1:
        raise TokenGameError(f"--holdout is a share between 0 and 1, not {holdout}")
    order = np.random.default_rng(seed).permutation(len(source.names)).tolist()
    held = min(max(1, round(holdout * len(order))), len(order) - 1)
    if held < 1:
        raise TokenGameError("one image cannot be both trained on and held back; give more images")
    return Subset(source, sorted(order[held:])), Subset(source, sorted(order[:held]))
