"""Fashion scenes: the packaged photos, and the whole Fashion-MNIST."""

import gzip

import numpy as np
import pytest

from tokengame.data.datasets import open_images
from tokengame.data.scenes import FashionScenes
from tokengame.errors import TokenGameError


def test_scenes_are_functions_of_seed_and_index():
    one, two, other = (
        FashionScenes("test", 50, seed=3),
        FashionScenes("test", 50, seed=3),
        FashionScenes("test", 50, seed=4),
    )
    assert np.array_equal(one[7].image, two[7].image)
    assert not np.array_equal(one[7].image, other[7].image)
    assert all(one.label(i) == one[i].label for i in range(50))


def test_the_box_of_a_scene_is_where_the_item_is():
    """Without clutter nothing but the item is bright, and all of it lies in its box."""
    sizes = []
    for scene in (FashionScenes("test", 40, seed=1, clutter=0)[i] for i in range(40)):
        rows, columns = np.nonzero(np.asarray(scene.image) > 20)
        left, top, right, bottom = scene.box
        assert (left, top) <= (columns.min(), rows.min())
        assert columns.max() < right
        assert rows.max() < bottom
        sizes.append(max(right - left, bottom - top) / 112)
    assert min(sizes) < 0.4
    assert max(sizes) > 0.8


def test_embedded_scenes_by_name():
    counts = {"fashion": 1000, "fashion-val": 5000, "fashion-train": 20000}
    sources = {name: open_images(name) for name in counts}
    assert {name: len(source.names) for name, source in sources.items()} == counts
    assert len({np.asarray(source.open(0)).tobytes() for source in sources.values()}) == 3


def test_scenes_of_the_whole_fashion_mnist(tmp_path):
    """In the distribution's own format: IDX files, header and bytes, compressed; one scene of every photo."""
    photos = np.random.default_rng(0).integers(30, 256, (7, 28, 28)).astype(np.uint8)
    labels = np.arange(7).astype(np.uint8)
    shape = b"".join(n.to_bytes(4, "big") for n in photos.shape)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + shape + photos.tobytes()))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01" + shape[:4] + labels.tobytes()))
    source = open_images(f"fashion-train:{tmp_path}")
    assert sorted(source.labels) == list(range(7))
    assert source.open(6).size == (112, 112)
    with pytest.raises(TokenGameError, match=f"no Fashion-MNIST .* in {tmp_path}"):
        open_images(f"fashion-val:{tmp_path}")


def test_train_and_test_scenes_share_no_photo():
    train, test = (FashionScenes(split, 1).photos.images.reshape(-1, 784) for split in ("train", "test"))
    assert not {photo.tobytes() for photo in train} & {photo.tobytes() for photo in test}


@pytest.fixture
def mnist():
    """Four photos in the distribution's own format, not compressed: name -> bytes."""
    photos = np.random.default_rng(0).integers(30, 256, (4, 28, 28)).astype(np.uint8)
    shape = b"".join(n.to_bytes(4, "big") for n in photos.shape)
    return {
        "train-images-idx3-ubyte.gz": b"\0\0\x08\x03" + shape + photos.tobytes(),
        "train-labels-idx1-ubyte.gz": b"\0\0\x08\x01" + shape[:4] + bytes(range(4)),
    }


def damages(files):
    images, labels = files
    yield "cut", {images: files[images][:-5]}
    yield "short", {images: files[images][:3]}
    yield "empty", {labels: b""}
    yield "swapped", {images: files[labels], labels: files[images]}
    yield "of other sizes", {images: files[images][:8] + (2**31).to_bytes(4, "big") + files[images][12:]}
    yield "a label too many", {labels: b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes(range(5))}
    yield "an unknown class", {labels: files[labels][:-1] + b"\x0a"}


def test_damaged_files_of_fashion_mnist_are_a_sentence(mnist, tmp_path):
    for name, changed in damages(mnist):
        for file, content in (mnist | changed).items():
            (tmp_path / file).write_bytes(gzip.compress(content))
        with pytest.raises(TokenGameError, match=r"no Fashion-MNIST .* in "):
            pytest.fail(f"{name}: {open_images(f'fashion-train:{tmp_path}').labels}")
    for content in (b"", b"no gzip", gzip.compress(mnist["train-labels-idx1-ubyte.gz"])[:-9]):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
        with pytest.raises(TokenGameError, match=r"no Fashion-MNIST .* in "):
            open_images(f"fashion-train:{tmp_path}")


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(mnist, tmp_path):
    for file, content in mnist.items():
        (tmp_path / file).write_bytes(gzip.compress(content))
    whole = gzip.compress(bytes(2**24))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole * 64)  # a GiB: gzip members follow one another
    with pytest.raises(TokenGameError, match="damaged or not in IDX format"):
        open_images(f"fashion-train:{tmp_path}")
