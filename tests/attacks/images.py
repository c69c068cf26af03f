"""Mutated images, archives and class maps. An image is read or counted as unreadable; labels are right or refused."""

from __future__ import annotations

import io
import random
import shutil
import struct
import tarfile
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

from attacks.bytes import damaged
from attacks.outcome import generator, require
from attacks.world import NAME, World
from tokengame.backbones import preprocessing_of
from tokengame.data.batches import plain_views
from tokengame.data.datasets import label_images, open_images

FORMATS = {
    "jpg": ("JPEG", ("RGB", "L", "CMYK")), "png": ("PNG", ("RGB", "RGBA", "P", "L", "1", "I;16", "LA")),
    "gif": ("GIF", ("P", "L")), "webp": ("WEBP", ("RGB", "RGBA")), "bmp": ("BMP", ("RGB", "L", "1", "P")),
    "tif": ("TIFF", ("RGB", "F", "I", "I;16", "CMYK", "1", "L")), "avif": ("AVIF", ("RGB", "RGBA")),
    "ppm": ("PPM", ("RGB",)), "pgm": ("PPM", ("L",)), "dds": ("DDS", ("RGB", "RGBA")), "ico": ("ICO", ("RGBA",)),
    "tga": ("TGA", ("RGB",)), "jp2": ("JPEG2000", ("RGB",)), "pcx": ("PCX", ("RGB",)), "im": ("IM", ("RGB",)),
}  # fmt: skip
NAMES = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "pgm")
"""extensions under which files are read, whatever they hold"""
SIDES = (
    (100_000_000, 1), (1, 100_000_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535), (16_383, 16_383),
    (9_000, 9_000), (0, 0), (0, 40),
)  # fmt: skip
ENCODINGS = ("utf-8-sig", "utf-16", "latin-1")
"""in which a class map may be read"""


def case(world: World, seed: int, number: int) -> str:
    """One image, archive or class map, read as the commands read it."""
    rng = generator("images", seed, number)
    kind = rng.choices(("image", "size", "bomb", "tar", "map"), (70, 10, 2, 10, 8))[0]
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        return {"image": _image, "size": _size, "bomb": _bomb, "tar": _tar, "map": _map}[kind](Path(folder), rng)


@lru_cache
def encoded(extension: str, mode: str) -> bytes:
    """A sound image."""
    values = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
    elif mode in ("F", "I"):
        image = image.convert("L").convert(mode)
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, FORMATS[extension][0])
    return file.getvalue()


def _sound(rng: random.Random) -> tuple[str, str, bytes]:
    extension = rng.choice(list(FORMATS))
    mode = rng.choice(FORMATS[extension][1])
    return extension, mode, encoded(extension, mode)


def _image(folder: Path, rng: random.Random) -> str:
    """Damaged bytes, or sound ones, under their own or another extension."""
    extension, mode, data = _sound(rng)
    what = "sound"
    if rng.random() < 0.95:
        data, what = damaged(data, rng, head=200)
    name = extension if rng.random() < 0.5 else rng.choice(NAMES)
    read = _read(folder, data, name)
    require(what != "sound" or read or name not in NAMES or extension not in NAMES, f"a sound {extension} is not read")
    return f"{extension} {mode} as .{name}: {what}, {'read' if read else 'unreadable'}"


def _size(folder: Path, rng: random.Random) -> str:
    """A header that claims an absurd size; checksums are right."""
    width, height = rng.choice(SIDES)
    kind = rng.choice(("png", "bmp", "gif", "ppm", "tif", "jpg", "webp", "pgm"))
    name = kind if rng.random() < 0.8 else rng.choice(NAMES)
    read = _read(folder, _claims(kind, width, height), name)
    require(not read, f"a {kind} of {width} x {height} without content is read")
    return f"{kind} of {width} x {height} as .{name}, unreadable"


def _claims(kind: str, width: int, height: int) -> bytes:
    """A file of hardly any content whose header has this size, as far as its fields reach."""
    if kind == "png":
        return png(width, height, 8, 0, b"\0" * 9)
    if kind == "bmp":
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + b"\0" * 9
    if kind in ("ppm", "pgm"):
        return f"P{6 if kind == 'ppm' else 5}\n{width} {height}\n255\n".encode() + b"\0" * 9
    data = bytearray(encoded(kind, "P" if kind == "gif" else "RGB"))
    wide, high = min(width, 65_535), min(height, 65_535)
    if kind == "gif":
        data[6:10] = struct.pack("<HH", wide, high)
        at = data.index(b",\0\0\0\0")
        data[at + 5 : at + 9] = struct.pack("<HH", wide, high)
    elif kind == "jpg":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", high, wide)
    elif kind == "webp":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", min(width, 16_383), min(height, 16_383))
    else:
        for tag, value in ((256, width), (257, height)):  # width and length, as 32 bits
            at = next(at for at in map(data.find, (struct.pack("<HH", tag, kind) for kind in (3, 4))) if at >= 0)
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data[: len(data) // 2])


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, packed: bool = False) -> bytes:
    """A PNG from its header's fields and its pixels, which are packed here unless they are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = pixels if packed else zlib.compress(pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _bomb(folder: Path, rng: random.Random) -> str:
    """A valid image of few bytes and many pixels: read in little memory, or unreadable."""
    kind = rng.choice(("1", "L", "16", "RGB", "RGBA", "P", "tif 1", "tif F", "gif", "webp"))
    side = rng.choice((5_000, 9_000, 13_000))
    extension = kind.split()[0] if kind in ("tif 1", "tif F", "gif", "webp") else "png"
    made = folder.parent / "bombs" / f"{kind} {side}"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        made.write_bytes(bomb(kind, side))
    read = _read(folder, made.read_bytes(), extension)
    return f"{kind} of {side} x {side}, {'read' if read else 'unreadable'}"


def bomb(kind: str, side: int) -> bytes:
    """An image of one colour, packed row by row, so that making it takes little memory."""
    depths = {"1": (1, 0, 1), "L": (8, 0, 8), "16": (16, 0, 16), "RGB": (8, 2, 24), "RGBA": (8, 6, 32)}
    if kind in depths:
        depth, colour, bits = depths[kind]
        pack, row = zlib.compressobj(1), b"\0" * (1 + (side * bits + 7) // 8)
        return png(side, side, depth, colour, b"".join(pack.compress(row) for _ in range(side)) + pack.flush(), True)
    file, side = io.BytesIO(), min(side, 5_000)
    mode, form, settings = {
        "P": ("P", "PNG", {}), "tif 1": ("1", "TIFF", {"compression": "group4"}), "gif": ("L", "GIF", {}),
        "tif F": ("F", "TIFF", {"compression": "tiff_adobe_deflate"}), "webp": ("RGB", "WEBP", {"method": 0}),
    }[kind]  # fmt: skip
    Image.new(mode, (side, side)).save(file, form, **settings)
    return file.getvalue()


def _read(folder: Path, data: bytes, extension: str) -> bool:
    """Whether the loader reads the image; raises what it raises."""
    (folder / "a").mkdir()
    (folder / "a" / f"x.{extension}").write_bytes(data)
    source = open_images(str(folder)) if extension in NAMES else _listed(folder, extension)
    return source is not None and readable(source)


def _listed(folder: Path, extension: str) -> Any:
    """The folder's images under an extension that may be known or not; a sound image lies beside."""
    (folder / "a" / "y.png").write_bytes(encoded("png", "RGB"))
    source = open_images(str(folder))
    return source if source.names[0].endswith(extension) else None


def readable(source: Any) -> bool:
    """Whether the first image can be read; raises `Defect` where what is read is no image."""
    _, image, bad = plain_views(source, preprocessing())[0]
    if image is None:
        require(bad and bad[0][1], "an unreadable image without a reason")
        return False
    require(image.shape == (3, 32, 32) and bool(image.isfinite().all()), f"read as {tuple(image.shape)}")
    return True


@lru_cache
def preprocessing() -> dict[str, Any]:
    """Of the small model."""
    return preprocessing_of(timm.create_model(NAME, num_classes=5))


def _tar(folder: Path, rng: random.Random) -> str:
    """A damaged archive is refused, or its images are those that lie in it."""
    data = archive(rng.random() < 0.5)
    changed, what = damaged(data, rng, head=rng.choice((512, 2048)))
    path = folder / "x.tar"
    path.write_bytes(changed)
    source = open_images(str(path))
    for name in source.names:
        require(".." not in Path(name).parts or not (folder / name).exists(), "a path leaves the archive")
    views = plain_views(source, preprocessing())
    label_images(source, None, 5)
    for number in range(len(source.names)):
        views[number]
    require(source.labels is None or all(0 <= label < 5 for label in source.labels), "labels that are no classes")
    return f"tar: {what}, {len(source.names)} images"


@lru_cache
def archive(classes: bool) -> bytes:
    """Five images in class folders, or with their classes beside them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for label, name in enumerate("abcde"):
            members = [(f"{name}/0.png", encoded("png", "RGB"))] + [(f"{name}/0.cls", str(label).encode())] * classes
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _map(folder: Path, rng: random.Random) -> str:
    """A damaged class map is refused, or every image has the number of the one line that names its folder."""
    sound = "a\nb\nc\nd\ne\n".encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")))
    extra = rng.choice((b"", b"a\n", b"\n\n", b"f\ng\n", b"\xff\xfe", b"x" * 100_000))
    data = sound + extra
    what = "as it is"
    if rng.random() < 0.7:
        data, what = damaged(data, rng)
    path = folder / "classes.txt"
    path.write_bytes(data)
    for name in "abcde":
        (folder / "images" / name).mkdir(parents=True)
        shutil.copyfile(_png(folder), folder / "images" / name / "0.png")
    source = open_images(str(folder / "images"))
    label_images(source, str(path), 5)
    for name, label in zip(source.names, source.labels or [None] * 5, strict=True):
        named = [lines_naming(Path(name).parent.name, data, encoding) for encoding in ENCODINGS]
        require([label] in named, f"class map, {what}: {name} has label {label}, and lines {named[0]} name it")
    return f"class map: {what}"


def lines_naming(folder: str, data: bytes, encoding: str) -> list[int]:
    """Numbers of the lines of a text that are a folder's name."""
    try:
        lines = data.decode(encoding).splitlines()
    except UnicodeError:
        return []
    return [number for number, line in enumerate(lines) if line.strip() == folder]


def _png(folder: Path) -> Path:
    path = folder / "sound.png"
    if not path.exists():
        path.write_bytes(encoded("png", "RGB"))
    return path
