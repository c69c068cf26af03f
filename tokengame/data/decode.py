"""From a file to pixels: which formats are read, how large an image may be, and what an unreadable one is.

EXIF orientation is ignored, as by timm's `ImageDataset` and torchvision's `ImageFolder`, on whose images models were
trained. Of animations and of files with several pages the first image is read.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from tokengame.data.transforms import to_rgb
from tokengame.errors import first_line

EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
"""of files that are taken for images; what is in a file decides how it is read"""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's decoders that are used, none of which starts another program"""
MAX_PIXELS = 50_000_000
"""of one image, known before it is decoded, so that none takes more than 512 MiB"""
COSTLY = {"WEBP", "AVIF", "CMYK"}
"""formats and modes that take twice the memory of others, so that their images may have half the pixels"""
TILEWIDTH, TILELENGTH = 322, 323
"""tags of TIFF"""
MAX_ASPECT = 100
"""longer side / shorter side; the shorter one is resized to the model's, which would make a longer image giant"""
MAX_BYTES = 2**28
"""of one file: some decoders read it whole"""

Result = TypeVar("Result")


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Those of `FORMATS` that the installed Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(content: bytes | str | Path) -> Image.Image:
    """The image in a file or in its bytes, not decoded yet.

    Raises:
        OSError, ValueError: it is empty, too large, or of another format.
    """
    size = len(content) if isinstance(content, bytes) else os.stat(content).st_size
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"the file has {size:,} bytes, more than {MAX_BYTES:,}" if size else "the file is empty")
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(f"the file is no {', '.join(_formats())} image, or damaged") from None


def decoded(open_image: Callable[[], Image.Image]) -> Image.Image | str:
    """The image in RGB, or why it cannot be read."""
    return _attempt(lambda: _rgb(open_image()))


def viewed(open_image: Callable[[], Image.Image | Tensor], transform: Callable[[Image.Image], Tensor]) -> Tensor | str:
    """The image in RGB, transformed, or why it cannot be read; a tensor, which is transformed already, as it is."""

    def view() -> Tensor:
        image = open_image()
        return image if isinstance(image, Tensor) else transform(_rgb(image))

    return _attempt(view)


def _attempt(read: Callable[[], Result]) -> Result | str:
    """Decoders raise whatever they like at damaged files: any exception makes an image unreadable."""
    try:
        with _quiet():
            return read()
    except Exception as error:
        return first_line(error)


def _rgb(opened: Image.Image) -> Image.Image:
    with opened as image:
        _require_bounded(image)
        return to_rgb(image)


def _require_bounded(image: Image.Image) -> None:
    """Raise ValueError if an image that is not decoded yet would take too much memory, now or resized."""
    width, height = image.size
    most = MAX_PIXELS // 2 if COSTLY & {image.format, image.mode} else MAX_PIXELS
    if width * height > most:
        raise ValueError(f"{width:,} x {height:,} pixels are more than {most:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width:,} x {height:,} pixels: one side is more than {MAX_ASPECT} times the other")
    if isinstance(image, TiffImageFile):  # decoded tile by tile, and a tile may be larger than the image
        tile = image.tag_v2.get(TILEWIDTH, 0) * image.tag_v2.get(TILELENGTH, 0)
        if tile > most:
            raise ValueError(f"tiles of {tile:,} pixels, more than {most:,}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Decoders warn and log at every odd file; it is read or it is not."""
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def printable(name: str) -> str:
    """`name` with line breaks, and bytes that are no text, as escapes; file names may hold anything."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def counted(number: int, what: str) -> str:
    """ "1 image", "1,200 images"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
