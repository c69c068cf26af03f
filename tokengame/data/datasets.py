"""Where images come from: a folder of class folders, a .tar of the same, a Hugging Face data set, embedded scenes.

A source knows the name and label of each image and opens any of them. Only a stream cannot.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image

from tokengame.data.archives import TarImages
from tokengame.data.class_map import ClassMap
from tokengame.data.decode import EXTENSIONS, counted, is_image, printable
from tokengame.data.folders import FolderImages, fitting, images_below
from tokengame.data.hub import HuggingFaceImages, HuggingFaceStream, missing
from tokengame.data.labels import label_by_folder, label_by_own, label_stream
from tokengame.data.samples import Samples
from tokengame.data.scenes import CLASSES, FashionScenes, load_photos
from tokengame.data.stream import Stream
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Progress, silent

SHARDS = 1_000_000
"""files that a pattern of braces may name"""
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


class SceneImages:
    """The embedded fashion scenes as a source."""

    label_origin: str = "what they show"
    class_names: Sequence[str] | None = CLASSES

    def __init__(self, scenes: FashionScenes):
        self.scenes = scenes
        self.names = [f"scene {i}" for i in range(len(scenes))]
        self.labels: list[int] | None = [scenes.label(i) for i in range(len(scenes))]
        self.own_labels: Sequence[Any] | None = self.labels

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
            FOLDER; a folder; an image; a tar; tar shards, as "train-{0000..0127}.tar" or "shards/*.tar"; folders and
            images by such a pattern; or the name of a Hugging Face data set, after "stream:" to learn from it while it
            arrives.
        split: of a Hugging Face data set.
        watch: shows progress where many folders or shards are looked through.

    Raises:
        TokenGameError: nothing there, or no image in it.
    """
    if location.partition(":")[0] in EMBEDDED_SCENES:
        return SceneImages(_scenes(*location.partition(":")[::2]))
    if location.startswith(STREAM):
        return HuggingFaceStream(location.removeprefix(STREAM), split)
    if not location:
        raise TokenGameError("--images is empty; give a folder, a tar or the name of a data set")
    try:
        source = _local(location, os.path.expanduser(location), watch)
    except OSError as error:
        where = printable(str(error.filename or location))
        raise TokenGameError(f"cannot read {where} ({error.strerror or first_line(error)})") from None
    if source is None:
        return HuggingFaceImages(location, split)
    if not source.names:
        raise TokenGameError(f"no image in {location} (looked for {' '.join(EXTENSIONS)}){_archives(location)}")
    return source


def _local(location: str, path: str, watch: Progress) -> FolderImages | TarImages | None:
    """The images at a place of this machine; None where there is nothing and it may be the name of a data set."""
    if os.path.isdir(path):
        return images_below(Path(path), watch)
    if os.path.isfile(path):
        alone = FolderImages(Path(path).parent, [os.path.basename(path)])
        return alone if is_image(path) else TarImages([Path(path)])
    if set(path) & set("*?[{"):
        paths = _fitting(path)
        tars = [name for name in paths if name.endswith(".tar") and os.path.isfile(name)]
        return TarImages([Path(name) for name in paths], watch) if tars == paths else fitting(location, paths, watch)
    if path.endswith((".tar", ".zip", ".gz")) or is_image(path) or path[0] in "./~" or path.count("/") > 1:
        raise TokenGameError(f"no {missing(location)}")
    return None


def _archives(folder: str) -> str:
    """What to do with a folder that holds archives instead of images."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if any(name.endswith(".tar") for name in names):
        return f"; it has tars: --images '{os.path.join(folder, '*.tar')}' reads them in place"
    packed = next((name for name in names if name.endswith((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst"))), None)
    return f"; unpack {printable(packed)}" if packed else ""


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


def _fitting(pattern: str) -> list[str]:
    """The files and folders that a pattern of braces ({a..b}) and wildcards (*, ?) means, sorted, each once.

    Raises:
        TokenGameError: one that braces name is missing, no file fits, or it names too many.
    """
    from braceexpand import braceexpand

    kind = "tar file" if pattern.endswith(".tar") else "file or folder"
    if _named_by_braces(pattern) > SHARDS:
        raise TokenGameError(f"{pattern} names more than {SHARDS:,} files")
    paths: dict[str, None] = {}
    try:
        names = braceexpand(pattern)
    except ValueError as error:
        raise TokenGameError(f"{pattern} has braces that do not match ({error})") from None
    for name in names:
        there = [name] if not set(name) & set("*?[") else sorted(glob(name))
        if not there or not os.path.exists(there[0]):
            raise TokenGameError(f"no {kind} at {name}, which {pattern} names")
        paths |= dict.fromkeys(there)
    return list(paths)


def _named_by_braces(pattern: str) -> int:
    """At most how many names a pattern of braces has, counted from the inside without expanding it."""
    count = 1
    while inner := re.search(r"\{([^{}]*)\}", pattern):
        count *= _alternatives(inner[1])
        pattern = pattern[: inner.start()] + pattern[inner.end() :]
    return count


def _alternatives(inner: str) -> int:
    """Of {a,b} or {0..9}, given without the braces."""
    ends = re.match(r"(-?[0-9]+|[A-Za-z])\.\.(-?[0-9]+|[A-Za-z])", inner)
    if ends is None:
        return inner.count(",") + 1
    if max(map(len, ends.groups())) > 18:
        return 10**18
    first, last = (ord(end) if end.isalpha() else int(end) for end in ends.groups())
    return abs(last - first) + 1


def label_images(source: ImageSet, class_map: str | None, classes: int) -> str:
    """Label the images with the model's class indices, where that can be done, and say how, or why not.

    Class folders are matched by name with the lines of the file `class_map`; without one, the folders in natural order
    (2 before 10, as in timm) are the classes if there are exactly `classes` of them, and else the images stay
    unlabelled. Images beside the class folders of a labelled set are left out. Labels of a data set or of shards are
    class indices, or names that `class_map` has.

    Returns:
        One sentence: how many images and classes, labelled or not and why, and what was left out.

    Raises:
        TokenGameError: `class_map` is missing, names another number of classes, or does not know a class; or a label
            is no class index of the model.
    """
    names = None if class_map is None else ClassMap(class_map)
    if isinstance(source, HuggingFaceStream):
        return f"{source.names[0]}: a stream, {label_stream(source, names, classes)}"
    if isinstance(source, FolderImages | TarImages) and source.own_labels is None:
        how = label_by_folder(source, names, classes)
    elif isinstance(source, TarImages | HuggingFaceImages | SceneImages):
        how = label_by_own(source, names, classes)
    else:
        raise TypeError(f"{type(source).__name__} is labelled before it is divided")
    notes = source.notes if isinstance(source, FolderImages | TarImages) else []
    return "; ".join([f"{counted(len(source.names), 'image')} {how}", *notes])


@overload
def split_images(source: ImageSource, holdout: float, seed: int) -> tuple[ImageSource, ImageSource]: ...
@overload
def split_images(source: ImageSource | Stream, holdout: float, seed: int) -> tuple[ImageSet, ImageSource]: ...


def split_images(source: ImageSource | Stream, holdout: float, seed: int) -> tuple[ImageSet, ImageSource]:
    """Seeded random parts for training and validation, `holdout` (a share) held back; at least one image in each.

    Of a stream its first images are held back, whatever `holdout` says.
    """
    if isinstance(source, Stream):
        return source.split(holdout)
    if not 0 < holdout < 1:
        raise TokenGameError(f"--holdout is a share between 0 and 1, not {holdout}")
    order = np.random.default_rng(seed).permutation(len(source.names)).tolist()
    held = min(max(1, round(holdout * len(order))), len(order) - 1)
    if held < 1:
        raise TokenGameError("one image cannot be both trained on and held back; give more images")
    part = source.part if isinstance(source, Samples) else partial(Subset, source)
    return part(sorted(order[held:])), part(sorted(order[:held]))
