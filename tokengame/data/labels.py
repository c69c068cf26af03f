"""Labelling images: by their folders, by the labels that come with them, or as they are streamed; and saying how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import PurePath, PurePosixPath
from typing import Any, Protocol

from tokengame.data.archives import TarImages
from tokengame.data.class_map import ClassMap, class_index, mapped_index
from tokengame.data.decode import counted, printable
from tokengame.data.folders import FolderImages
from tokengame.data.hub import HuggingFaceStream
from tokengame.errors import TokenGameError


class OwnLabels(Protocol):
    """Images that come with labels."""

    names: list[str]
    labels: list[int] | None
    own_labels: Sequence[Any] | None
    """as they came, None for images without one; None where there are none at all"""
    class_names: Sequence[str] | None
    """of the classes that labels count, if they are known"""
    label_origin: str
    """where they come from, for messages"""


def natural_key(name: str) -> list[Any]:
    """Sorts 2 before 10, as timm sorts class folders; without its failures at digits that are no numbers."""
    pieces: list[Any] = re.split(r"([0-9]+)", name.lower())
    pieces[1::2] = [(len(digits.lstrip("0")), digits.lstrip("0")) for digits in pieces[1::2]]
    return [pieces, name]


def nested(folders: Iterable[str]) -> str | None:
    """A folder with images that lies in another one with images, by its path."""
    known = set(folders)
    return next((f for f in sorted(known) if any(str(p) in known for p in PurePosixPath(f).parents if p.name)), None)


def label_by_folder(source: FolderImages | TarImages, class_map: ClassMap | None, classes: int) -> str:
    """Label images by the folders that they lie in; those in none are left out of a labelled set.

    Returns:
        How many class folders there are, and labelled how, or why not.

    Raises:
        TokenGameError: `class_map` does not fit the folders or the model.
    """
    source.labels = None
    paths = [PurePath(file).parent.as_posix() for file in source.files]
    folders = [PurePosixPath(path).name for path in paths]
    known = sorted(set(folders) - {""}, key=natural_key)
    if not known:
        if class_map is not None:
            raise TokenGameError("--class-map needs class folders, and these images lie in none")
        return "in no class folder, unlabelled"
    where = f"in {counted(len(known), 'class folder')}"
    inside = nested(paths)
    if class_map is None and len(known) != classes:
        return f"{where}, unlabelled: {_of_model(classes, 'says which these are')}"
    if class_map is None and inside is not None:
        return f"{where}, unlabelled: {printable(inside)} lies in another class folder"
    index = dict(zip(known, range(classes), strict=True)) if class_map is None else _mapped(known, class_map, classes)
    stray = [name for name, folder in zip(source.names, folders, strict=True) if not folder]
    source.keep([i for i, folder in enumerate(folders) if folder])
    source.labels = [index[folder] for folder in folders if folder]
    how = f"{where}, labelled by {_order(known) if class_map is None else class_map.path}"
    if stray:
        how += f"; {counted(len(stray), 'image')} beside the class folders left out, the first is {stray[0]}"
    return how


def _of_model(classes: int, hint: str) -> str:
    return f"the model has {classes:,} classes; --class-map FILE {hint}" if classes else "the model has no classes"


def _order(known: list[str]) -> str:
    """The order that was taken for the model's, with a warning where the field does not agree on it."""
    order = "folder in timm's natural order"
    return order if known == sorted(known) else f"{order}; torchvision sorts otherwise, which --class-map FILE can say"


def _mapped(known: list[str], class_map: ClassMap, classes: int) -> dict[str, int]:
    found = {folder: class_map.find(folder) for folder in known}
    strange = [folder for folder, index in found.items() if index is None]
    if strange:
        count = f"{len(strange)} class folders are not in {class_map.path}"
        raise TokenGameError(f"{count}, among them {printable(strange[0])!r}: rename or add them")
    class_map.require_classes(classes)
    return {folder: index for folder, index in found.items() if index is not None}


def label_by_own(source: OwnLabels, class_map: ClassMap | None, classes: int) -> str:
    """Label images by the labels that come with them: class indices, or names that `class_map` has.

    Returns:
        Labelled how, or why not.

    Raises:
        TokenGameError: a label is no class of the model, or of the class map.
    """
    own, source.labels = source.own_labels, None
    reason = _why_not(own is not None, source.class_names, class_map, classes)
    if own is None or reason:
        return f"unlabelled: {reason}"
    read = _reader(source.class_names, class_map, classes)
    labels = [None if label is None else read(label, name) for label, name in zip(own, source.names, strict=True)]
    gaps = [name for name, label in zip(source.names, labels, strict=True) if label is None]
    if gaps:
        return f"unlabelled: {len(gaps):,} of them have no label, the first is {gaps[0]}"
    source.labels = [label for label in labels if label is not None]
    by = source.label_origin if class_map is None else f"{source.label_origin} and {class_map.path}"
    return f"of {len(set(labels)):,} classes, labelled by {by}"


def label_stream(stream: HuggingFaceStream, class_map: ClassMap | None, classes: int) -> str:
    """Have the labels of a stream read as its rows arrive, and those of its first rows now; like `label_by_own`."""
    reason = _why_not(stream.labels is not None, stream.class_names, class_map, classes)
    if reason:
        stream.labels = None
        return f"unlabelled: {reason}"
    stream.read_label = _reader(stream.class_names, class_map, classes)
    for row in stream.first.rows:
        stream.read_label(row.label, row.name)
    return "labelled by its column label" + ("" if class_map is None else f" and {class_map.path}")


def _why_not(labelled: bool, class_names: Sequence[str] | None, class_map: ClassMap | None, classes: int) -> str:
    """Why labels cannot be used, if so.

    Raises:
        TokenGameError: there are none for `class_map` to map, it does not fit the model, or they have more classes.
    """
    if not labelled and class_map is not None:
        raise TokenGameError("--class-map needs labels, and the data set has no column 'label'")
    if not labelled:
        return "the data set has no column 'label'"
    if class_map is not None:
        class_map.require_classes(classes)
    elif class_names is not None and len(class_names) != classes:
        if len(class_names) > classes > 0:
            raise TokenGameError(f"the data set has {len(class_names)} classes but the model has {classes}")
        return f"the data set has {len(class_names)} classes but {_of_model(classes, 'maps their names')}"
    return "" if classes else _of_model(classes, "")


def _reader(class_names: Sequence[str] | None, class_map: ClassMap | None, classes: int) -> Any:
    """From a label as it comes, and the name of its image, to a class index of the model."""
    if class_map is None:
        return partial(class_index, classes=classes)
    return partial(mapped_index, class_map=class_map, class_names=class_names)
