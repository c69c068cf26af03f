"""Fashion scenes: the embedded data set, real photos of clothing hidden in clutter.

Each scene is one Fashion-MNIST photo (Xiao et al. 2017, MIT licence) at a random position and size over a canvas of
fragments of other photos. The item's box is known, so one can count how often a pruning policy keeps the item's tokens
and how often the background's. A scene is a pure function of (split, seed, index): fresh scenes are one seed away.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LARGEST = 2**28
"""bytes of a file of photos, which may be compressed a thousandfold"""


@dataclass(frozen=True)
class Photos:
    """Source photos of one split."""

    images: np.ndarray
    """uint8 [n, 28, 28], item bright on black"""
    labels: np.ndarray
    """uint8 [n], index into `CLASSES`"""


def load_photos(split: str, folder: str | Path | None = None) -> Photos:
    """Photos of `split` ("train" or "test"): the packaged subset, or all of them from `folder`.

    `folder` holds the four files of the original distribution (``train-images-idx3-ubyte.gz``, ...), as Debian's
    package ``dataset-fashion-mnist`` installs them in ``/usr/share/datasets/fashion-mnist``.

    Raises:
        OSError, EOFError, zlib.error: a file of `folder` is not there or damaged.
        ValueError: the same, or `split` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if folder is not None:
        stem = {"train": "train", "test": "t10k"}[split]
        images = _read_idx(Path(folder) / f"{stem}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(Path(folder) / f"{stem}-labels-idx1-ubyte.gz", dimensions=1)
        if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() >= len(CLASSES):
            raise ValueError("images and labels do not fit together")
        return Photos(images, labels)
    packaged = files("tokengame") / "assets" / "fashion_photos.npz"
    with as_file(packaged) as path, np.load(path, allow_pickle=False) as archive:
        return Photos(archive[f"{split}_images"], archive[f"{split}_labels"])


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """uint8 array of an IDX file: two zeros, type, number of dimensions, sizes, bytes.

    Raises:
        ValueError: the file is not what its header says.
    """
    with gzip.open(path) as file:
        content = file.read(LARGEST)
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) - start != math.prod(shape):
        raise ValueError(f"{path.name} is damaged or not in IDX format")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    """grey image, size x size"""
    label: int
    """index into `CLASSES`"""
    box: tuple[int, int, int, int]
    """left, top, right, bottom of the item in pixels"""


class FashionScenes:
    """`length` scenes of `size` x `size` pixels, item side drawn uniformly from `item_share` of the canvas.

    Scene i shows photo i of a seeded permutation, so `length` up to the number of photos shows each at most once.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 1000,
        *,
        seed: int = 0,
        size: int = 112,
        item_share: tuple[float, float] = (0.28, 0.94),
        clutter: float = 1.0,
        photos: Photos | None = None,
    ):
        self.photos = photos or load_photos(split)
        self.length, self.seed, self.size = length, seed, size
        self.item_share, self.clutter = item_share, clutter

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        chosen = self._photo(index)
        rng = np.random.default_rng((self.seed, 1, index))
        canvas = self._clutter(rng)
        box = self._place(canvas, self.photos.images[chosen], rng)
        return Scene(Image.fromarray(canvas.astype(np.uint8)), int(self.photos.labels[chosen]), box)

    def label(self, index: int) -> int:
        """Class of scene `index`, without drawing it."""
        return int(self.photos.labels[self._photo(index)])

    def _photo(self, index: int) -> int:
        count = len(self.photos.labels)
        return int(_order(self.seed, index // count, count)[index % count])

    def _clutter(self, rng: np.random.Generator) -> np.ndarray:
        """Dim fragments of random photos, 6 to 12 source pixels wide, enlarged 1 to 3 times."""
        canvas = np.zeros((self.size, self.size), np.float32)
        fragments = round(self.clutter * 40 * (self.size / 112) ** 2)
        sources = rng.integers(len(self.photos.images), size=fragments)
        sides, scales = rng.integers(6, 13, fragments), rng.integers(1, 4, fragments)
        gains = rng.uniform(0.2, 0.6, fragments)
        for source, side, scale, gain in zip(sources, sides, scales, gains, strict=True):
            top, left = rng.integers(2, 27 - side, 2)
            piece = self.photos.images[source, top : top + side, left : left + side]
            piece = piece.repeat(scale, 0).repeat(scale, 1) * gain
            y, x = rng.integers(0, self.size - len(piece), 2)
            canvas[y : y + len(piece), x : x + len(piece)] = piece
        return canvas

    def _place(self, canvas: np.ndarray, photo: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Blend the photo into `canvas` in place; where the photo is black the clutter shows through."""
        rows, columns = np.flatnonzero(photo.max(1) > 20), np.flatnonzero(photo.max(0) > 20)
        item = photo[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        item = item[:, ::-1] if rng.random() < 0.5 else item
        side = rng.uniform(*self.item_share) * self.size
        height, width = (max(1, round(side * n / max(item.shape))) for n in item.shape)
        large = np.asarray(
            Image.fromarray(np.ascontiguousarray(item)).resize((width, height), Image.Resampling.BICUBIC), np.float32
        )
        top, left = rng.integers(0, self.size - height + 1), rng.integers(0, self.size - width + 1)
        alpha = np.clip(large / 40, 0, 1)
        view = canvas[top : top + height, left : left + width]
        view += alpha * (large - view)
        return int(left), int(top), int(left + width), int(top + height)
