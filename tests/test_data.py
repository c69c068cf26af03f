"""Images from every kind of source, readable and not."""

import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tokengame.data.batches import BadImages, Views, checked
from tokengame.data.datasets import label_images, open_images, split_images
from tokengame.data.hub import HuggingFaceImages
from tokengame.data.transforms import to_rgb, transform_for
from tokengame.errors import TokenGameError

PREPROCESSING = {"input_size": [3, 16, 16], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
                 "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip


def gradient(mode="RGB", size=(20, 16)):
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            gradient().rotate(9 * i).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def as_tar(folder):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname="images")
    return path


def batches(source, **settings):
    tally = BadImages(len(source.names))
    views = Views(source, range(len(source.names)), transform_for(PREPROCESSING, train=False), **settings)
    return list(checked(views.loader(8, 0), tally)), tally


def test_tar_and_folder_hold_the_same(folder):
    sources = [open_images(str(folder)), open_images(str(as_tar(folder)))]
    for source in sources:
        label_images(source, None, 3)
    one, two = (batches(source)[0] for source in sources)
    assert torch.equal(torch.cat([b.images for b in one]), torch.cat([b.images for b in two]))
    assert sources[0].labels == sources[1].labels == [0] * 10 + [1] * 10 + [2] * 10


def test_class_map_gives_the_models_indices(folder, tmp_path):
    source = open_images(str(folder))
    (tmp_path / "map.txt").write_text("ant\nowl\ncat\nbee\ndog\n")
    label_images(source, str(tmp_path / "map.txt"), 5)
    assert source.labels == [2] * 10 + [4] * 10 + [1] * 10
    with pytest.raises(TokenGameError, match="names 5 classes but the model has 4"):
        label_images(source, str(tmp_path / "map.txt"), 4)
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    with pytest.raises(TokenGameError, match=r"1 class folders are not in .*'owl'"):
        label_images(source, str(tmp_path / "map.txt"), 5)
    with pytest.raises(TokenGameError, match="no class map"):
        label_images(source, "nowhere.txt", 5)


def test_folders_that_are_not_the_models_classes_stay_unlabelled(folder):
    source = open_images(str(folder))
    label_images(source, None, 1000)
    assert source.labels is None
    assert batches(source)[0][0].labels is None


def test_hugging_face_data_set_from_local_files(folder, monkeypatch):
    pytest.importorskip("datasets", reason="pip install tokengame[hub]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder.parent / "cache")
    source = HuggingFaceImages(str(folder), "train")
    how = label_images(source, None, 3)
    loaded, _ = batches(source)
    assert sum(len(b.images) for b in loaded) == 30
    assert source.labels == [0] * 10 + [1] * 10 + [2] * 10
    assert how == "30 images of 3 classes, labelled by their column label"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("missing", "no folder or tar file"),
        ("empty", "no image in"),
        ("text.tar", "not a readable"),
        ("a.tar", "no folder"),
    ],
)
def test_a_location_without_images_is_refused_with_the_reason(location, reason, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("this is not an archive")
    with pytest.raises(TokenGameError, match=reason):
        open_images(str(tmp_path / location))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = gradient("L").convert(mode) if mode != "LA" else gradient("L").convert("LA")
    found = np.asarray(to_rgb(image)).astype(int)
    assert found.shape == (16, 20, 3)
    if mode != "1":
        assert np.abs(found - np.asarray(gradient())).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped():
    wide = np.asarray(gradient("L")).astype(np.uint16) * 257
    found = np.asarray(to_rgb(Image.fromarray(wide))).astype(int)
    assert np.abs(found - np.asarray(gradient())).max() <= 1


def test_transparency_falls_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255


def spoil(folder, count):
    buffer = io.BytesIO()
    gradient(size=(200, 160)).save(buffer, "JPEG")
    for i in range(count):
        (folder / "cat" / f"bad{i}.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def test_a_truncated_jpeg_is_skipped_counted_and_named(folder):
    spoil(folder, 1)
    source = open_images(str(folder))
    label_images(source, None, 3)
    loaded, tally = batches(source)
    assert sum(len(b.images) for b in loaded) == 30
    assert list(tally.reasons) == ["cat/bad0.jpg"]
    assert torch.cat([b.labels for b in loaded]).tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_many_bad_images_are_an_error(folder):
    spoil(folder, 3)
    with pytest.raises(TokenGameError, match=r"of 33 images cannot be read \(more than 5 %\), the first is cat/bad0"):
        batches(open_images(str(folder)))


def test_augmentation_by_name_repeats_too(folder):
    """RandAugment draws from numpy's generator."""
    source, augment = open_images(str(folder)), {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5}
    views = [Views(source, [3] * 8, transform_for(PREPROCESSING, True, augment), seed=7) for _ in range(2)]
    state = np.random.get_state()[1].copy()
    first = [views[0][k][1] for k in range(8)]
    assert np.array_equal(state, np.random.get_state()[1]), "the generator is put back"
    np.random.seed(5)
    again = [views[1][k][1] for k in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_an_error_beside_decoding_processes_ends_the_program():
    """Workers ignore signals to stop; a main process that exits ends them by one and must not wait for ever."""
    lines = [
        "from torchvision.transforms.v2.functional import pil_to_tensor",
        "from tokengame.data.batches import Views",
        "from tokengame.data.datasets import open_images",
        "batches = iter(Views(open_images('fashion'), range(100), pil_to_tensor).loader(2, workers=2))",
        "next(batches)",
        "raise RuntimeError('planted')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: planted\n")


def test_a_view_to_learn_from_replaces_an_unreadable_image(folder):
    spoil(folder, 1)
    source = open_images(str(folder))
    bad = source.names.index("cat/bad0.jpg")
    views = Views(source, [0, bad, 1], transform_for(PREPROCESSING, train=True), seed=0)
    index, image, reasons = views[1]
    assert (index, image.shape) == (bad + 1, (3, 16, 16))
    assert [name for name, _ in reasons] == ["cat/bad0.jpg"]
    (batch,) = views.loader(3, 0)
    assert batch.index.tolist() == [0, bad + 1, 1]


def as_shards(folder, names, labels=None):
    """Tars of one class folder each, as WebDataset has them: an image and its .cls side by side."""
    for number, name in enumerate(names):
        with tarfile.open(folder.parent / f"shard-{number:03}.tar", "w") as archive:
            for path in sorted((folder / name).iterdir()):
                archive.add(path, arcname=f"{name}{path.stem}.png")
                if labels is not None:
                    info = tarfile.TarInfo(f"{name}{path.stem}.cls")
                    info.size = len(labels[number])
                    archive.addfile(info, io.BytesIO(labels[number].encode()))


def test_shards_hold_the_same_as_the_folder(folder):
    as_shards(folder, ["cat", "dog", "owl"], ["0", "1", "2"])
    plain, watched = open_images(str(folder)), []
    label_images(plain, None, 3)
    for pattern in ("shard-{000..002}.tar", "shard-*.tar"):
        source = open_images(str(folder.parent / pattern), watch=lambda *what: watched.append(what[1:]) or what[0])
        label_images(source, None, 3)
        assert source.labels == plain.labels
        one, two = (torch.cat([b.images for b in batches(s)[0]]) for s in (plain, source))
        assert torch.equal(one, two)
    assert watched == [("looking up images in", 3)] * 2, "progress is shown over the shards"
    with pytest.raises(TokenGameError, match="not class indices below 2"):
        label_images(source, None, 2)


def test_progress_is_shown_over_many_folders(tmp_path):
    for i in range(101):
        (tmp_path / "set" / f"{i:03}" / "deeper").mkdir(parents=True)
        gradient().save(tmp_path / "set" / f"{i:03}" / "deeper" / "a.png")
    watched = []
    source = open_images(str(tmp_path / "set"), watch=lambda *what: watched.append(what[1:]) or what[0])
    assert source.names == [f"{i:03}/deeper/a.png" for i in range(101)]
    assert watched == [("looking for images in set", 101)]


def test_shards_that_are_missing_or_mislabelled_are_named(folder):
    as_shards(folder, ["cat"], ["feline"])
    with pytest.raises(TokenGameError, match=r"no tar file at .*shard-001.tar, which .* names"):
        open_images(str(folder.parent / "shard-{000..001}.tar"))
    with pytest.raises(TokenGameError, match="no tar file at"):
        open_images(str(folder.parent / "other-*.tar"))
    with pytest.raises(TokenGameError, match=r"cat0.cls in .*shard-000.tar holds no class index but b'feline'"):
        open_images(str(folder.parent / "shard-{000..000}.tar"))


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(TokenGameError, match="timm makes no augmentation"):
        transform_for(PREPROCESSING, train=True, augment={"auto_augment": "magic-m9"})


def test_split_is_seeded_whole_and_disjoint(folder):
    source = open_images(str(folder))
    learn, held = split_images(source, 0.3, seed=5)
    assert (len(learn.names), len(held.names)) == (21, 9)
    assert sorted(learn.names + held.names) == sorted(source.names)
    assert split_images(source, 0.3, seed=5)[1].names == held.names != split_images(source, 0.3, seed=6)[1].names


def test_views_repeat_exactly_and_can_start_in_the_middle(folder):
    source, order = open_images(str(folder)), [3, 1, 4, 1, 5, 9]
    transform = transform_for(PREPROCESSING, train=True)
    whole = [Views(source, order, transform, seed=7)[k][1] for k in range(6)]
    again = [Views(source, order, transform, seed=7, positions=range(2, 6))[k][1] for k in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], again, strict=True))
    assert not torch.equal(whole[1], whole[3]), "the same image is cropped differently each time"
