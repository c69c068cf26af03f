"""Streams: every image once a pass, repeatable, the same with any number of workers and processes, resumed exactly."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokengame.cli.main import main
from tokengame.data import hub
from tokengame.data.batches import BadImages, checked, require_readable
from tokengame.data.datasets import label_images, open_images, split_images
from tokengame.data.decode import decoded
from tokengame.data.loader import TrainingLoader
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError
from tokengame.learning.loop import Loop

datasets = pytest.importorskip("datasets", reason="pip install tokengame[hub]")

COUNT, HELD = 60, 12


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A data set in three parquet files; the label says which image it is, and so does its grey."""
    return write(tmp_path_factory.mktemp("stream"), range(COUNT))


def write(root, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for part in range(3):
        rows = range(part * COUNT // 3, (part + 1) * COUNT // 3)
        images = [Image.new("RGB", (24, 24), (4 * i,) * 3) for i in rows]
        table = datasets.Dataset.from_dict({"image": images, "label": [labels[i] for i in rows]}, features=features)
        table.to_parquet(root / f"train-0000{part}-of-00003.parquet")
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Streams of a few images; `datasets` sleeps five seconds after every pass over parquet, to let threads end."""
    monkeypatch.setattr(hub, "HELD", HELD)
    monkeypatch.setattr(hub, "BUFFER", 16)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


@pytest.fixture
def stream(parquet):
    return open_images(f"stream:{parquet}", "train")


def grey(image):
    return torch.tensor(np.asarray(image)[0, 0, :1] + np.random.randint(2)).float()


def labels(loader, start=0, workers=0):
    return [batch.labels.tolist() for batch in checked(loader.loader(start, workers), BadImages(10**6))]


def test_every_pass_has_every_image_once_in_another_order(stream):
    rows = stream.shuffled(seed=1)
    passes = [[next(rows).label for _ in range(COUNT)] for _ in range(3)]
    assert all(sorted(one) == list(range(COUNT)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert passes[0] != sorted(passes[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
def test_images_and_augmentation_do_not_depend_on_workers_or_start(stream):
    loader = TrainingLoader(stream, grey, seed=3, batch_size=8, updates=10)  # more than one pass
    alone, helped = (list(checked(loader.loader(workers=workers), BadImages(10**6))) for workers in (0, 2))
    assert len(alone) == 10
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    for start in (1, 9):
        later = list(checked(loader.loader(start), BadImages(10**6)))
        assert torch.equal(later[0].images, alone[start].images)
        assert len(later) == 10 - start


def test_two_processes_load_what_one_does(stream):
    whole = labels(TrainingLoader(stream, grey, 3, 8, 4))
    parts = [labels(TrainingLoader(stream, grey, 3, 8, 4, Processes(2, rank))) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_what_is_held_back_is_never_learned_from(stream):
    learn, held = split_images(stream, 0.5, seed=0)
    assert held.labels == list(range(HELD))
    assert held.open(5).getpixel((0, 0)) == (20, 20, 20)
    rows = learn.shuffled(seed=0)
    assert sorted(next(rows).label for _ in range(COUNT - HELD)) == list(range(HELD, COUNT))


def test_a_stream_with_too_few_images_is_refused(stream, monkeypatch):
    monkeypatch.setattr(hub, "HELD", 40)
    with pytest.raises(TokenGameError, match="only 60 images"):
        split_images(stream, 0.2, seed=0)


def test_unreadable_rows_are_named_and_the_batch_stays_whole(stream, monkeypatch):
    broken = hub.Row("broken", b"no image", 1)
    rows = [broken, next(stream.shuffled(0)), broken]
    monkeypatch.setattr(type(stream), "shuffled", lambda *_: iter(rows))
    batch = next(iter(TrainingLoader(stream, grey, 0, 3, 1).loader()))
    assert batch.images.shape == (3, 1)
    assert batch.labels.tolist() == [rows[1].label] * 3
    assert [name for name, _ in batch.bad] == ["broken", "broken"]


def test_an_image_folder_is_streamed_by_path(tmp_path):
    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    stream = open_images(f"stream:{tmp_path}", "train")
    rows = stream.shuffled(0)
    found = [next(rows) for _ in range(4)]
    assert stream.labels is None
    assert {row.open().getpixel((0, 0)) for row in found} == {0, 1, 2, 3}


def test_classes_a_model_does_not_have_are_found_at_the_start(tmp_path):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"image": [{"bytes": file.getvalue(), "path": None}], "label": [9]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    stream = open_images(f"stream:{tmp_path}", "train")
    label_images(stream, None, 10)
    with pytest.raises(TokenGameError, match="10 classes but the model has 5"):
        label_images(stream, None, 5)


def test_training_on_a_stream_resumes_exactly(monkeypatch, tmp_path):
    (tmp_path / "set").mkdir()
    parquet = write(tmp_path / "set", [i % 10 for i in range(COUNT)])
    common = [
        "--backbone", "fashion", "--images", f"stream:{parquet}", "--batch-size", "4", "--rollouts", "2",
        "--workers", "0", "--dtype", "float32", "--game.stages", "3", "--ppo.epochs", "1",
    ]  # fmt: skip

    def lines(name):
        return [json.loads(line) for line in (tmp_path / f"{name}_log" / "metrics.jsonl").read_text().splitlines()]

    whole, part = (str(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    assert main(["train", *common, "--updates", "3", "--output", whole]) == 0
    record, calls = Loop.save, []

    def stop_after_first(self):
        record(self)
        calls.append(self.learner.updates)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "save", stop_after_first)
    assert main(["train", *common, "--updates", "3", "--checkpoint-every", "1", "--output", part]) != 0
    monkeypatch.setattr(Loop, "save", record)
    assert main(["train", *common, "--updates", "3", "--output", part, "--resume"]) == 0
    assert lines("part") == lines("whole")
    assert [line["update"] for line in lines("part")] == [1, 2, 3]
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_commands_that_measure_refuse_a_stream_before_anything_is_loaded(capsys):
    arguments = ["--backbone", "vit_tiny_patch16_224", "--images", "stream:nowhere", "--policy", "none"]
    assert main(["eval", *arguments]) == 2
    assert "leave out stream:" in capsys.readouterr().err


def data_set(root, rows, label):
    """A data set on disk in a parquet file, of images of one shade each, None where a row has none."""
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [None if shade is None else Image.new("L", (24, 24), shade) for shade, _ in rows]
    table = datasets.Dataset.from_dict({"image": images, "label": [label for _, label in rows]}, features=features)
    root.mkdir(exist_ok=True)
    table.to_parquet(root / "train.parquet")
    return str(root)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def opened(location, streamed):
    return open_images(f"stream:{location}", "train") if streamed else hub.HuggingFaceImages(location, "train")


def labels_of(source):
    return (
        source.labels
        if isinstance(source, hub.HuggingFaceImages)
        else [row.label for row in source._named(source.rows)]
    )


both = pytest.mark.parametrize("streamed", [False, True])
WHICH = datasets.ClassLabel(names=["c", "b", "a"])


@both
@pytest.mark.usefixtures("cache")
def test_a_class_map_maps_the_names_of_a_data_set(streamed, tmp_path):
    location = data_set(tmp_path / "set", [(0, 0), (1, 1), (2, 2)], WHICH)
    (tmp_path / "map.txt").write_text("a\nb\nc\nd\n")
    source = opened(location, streamed)
    how = label_images(source, str(tmp_path / "map.txt"), 4)
    assert labels_of(source) == [2, 1, 0]
    assert how.endswith(f"labelled by {'its' if streamed else 'their'} column label and {tmp_path}/map.txt")
    location = data_set(tmp_path / "names", [(0, "a"), (1, "d")], datasets.Value("string"))
    source = opened(location, streamed)
    label_images(source, str(tmp_path / "map.txt"), 4)
    assert labels_of(source) == [0, 3]


@both
@pytest.mark.usefixtures("cache")
def test_a_class_map_that_does_not_fit_a_data_set_is_refused(streamed, tmp_path):
    location = data_set(tmp_path / "set", [(0, 0), (1, 1)], WHICH)
    for content, reason in (
        ("a\nb\nx\n", "the class 'c' of .* is not in"),
        ("a\n", "names 1 classes but the model has 3"),
    ):
        (tmp_path / "map.txt").write_text(content)
        with pytest.raises(TokenGameError, match=reason):
            label_images(opened(location, streamed), str(tmp_path / "map.txt"), 3)
    with pytest.raises(TokenGameError, match="no class map at"):
        label_images(opened(location, streamed), "nowhere.txt", 3)
    numbers = data_set(tmp_path / "numbers", [(0, 0), (1, 1)], datasets.Value("int64"))
    (tmp_path / "map.txt").write_text("a\nb\nc\n")
    with pytest.raises(TokenGameError, match=r"--class-map needs class names, but the label of .* is 0"):
        label_images(opened(numbers, streamed), str(tmp_path / "map.txt"), 3)


@both
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("label", "kind"), [(-1, "int64"), (5, "int64"), (1.0, "float32"), ("cat", "string"), (True, "bool")]
)
def test_labels_that_are_no_class_of_the_model_are_refused_at_the_start(label, kind, streamed, tmp_path):
    location = data_set(tmp_path / "set", [(0, label)], datasets.Value(kind))
    with pytest.raises(TokenGameError, match=rf"not class indices below 5: that of .* is {label!r}"):
        label_images(opened(location, streamed), None, 5)


@both
@pytest.mark.usefixtures("cache")
def test_a_data_set_of_fewer_classes_than_the_model_is_not_labelled(streamed, tmp_path):
    source = opened(data_set(tmp_path / "set", [(0, 0), (1, 1)], WHICH), streamed)
    how = label_images(source, None, 1000)
    assert "unlabelled: the data set has 3 classes but the model has 1,000 classes; --class-map FILE maps" in how
    assert labels_of(source) in (None, [None, None])


@pytest.mark.usefixtures("cache")
def test_gaps_in_the_labels_of_a_data_set_are_said(tmp_path):
    source = opened(data_set(tmp_path / "set", [(0, 0), (1, None)], datasets.Value("int64")), False)
    how = label_images(source, None, 3)
    assert how == f"2 images unlabelled: 1 of them have no label, the first is {tmp_path}/set[1]"


def test_a_label_that_the_model_does_not_have_is_refused_as_it_arrives(stream, monkeypatch):
    """Its first images are within reach at the start; here the label that is too large comes later."""
    monkeypatch.setattr(stream, "first", hub.HeldRows(stream.first.rows[:5]))
    label_images(stream, None, 50)
    learn, held = split_images(stream, 0.2, 0)
    assert held.labels == list(range(HELD))
    with pytest.raises(TokenGameError, match=r"not class indices below 50: that of .*image \d+ as streamed is 5\d"):
        labels(TrainingLoader(learn, grey, 0, 8, 10))


@both
@pytest.mark.usefixtures("cache")
def test_rows_without_an_image_are_unreadable(streamed, tmp_path):
    source = opened(data_set(tmp_path / "set", [(7, 0), (None, 1)], datasets.Value("int64")), streamed)
    images = source.first if streamed else source
    assert images.open(0).getpixel((0, 0)) == 7
    with pytest.raises(ValueError, match="the row holds no image"):
        images.open(1)
    with pytest.raises(TokenGameError, match=r"1 of 2 images tried cannot be read .*: the row holds no image"):
        require_readable(source if not streamed else images)


def test_a_file_that_a_row_names_but_that_is_gone_is_unreadable(tmp_path):
    row = hub.Row("row", str(tmp_path / "gone.png"), None)
    assert "No such file" in decoded(row.open)


def test_a_stream_that_cannot_be_read_on_is_refused_with_a_sentence(stream):
    def broken():
        yield {"image": {"bytes": b"", "path": None}, "label": 0}
        raise ConnectionError("the line is dead")

    rows = stream._named(broken())
    next(rows)
    with pytest.raises(TokenGameError, match="cannot be streamed any further: the line is dead"):
        next(rows)


def test_a_stream_of_unreadable_images_is_refused_before_training(tmp_path, capsys):
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": b"no image", "path": None}] * 40}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    output = str(tmp_path / "policy.safetensors")
    assert main(["train", "--backbone", "fashion", "--images", f"stream:{tmp_path}", "--output", output]) == 2
    errors = capsys.readouterr().err
    assert "a stream, unlabelled: the data set has no column 'label'" in errors
    assert "40 of 40 images tried cannot be read" in errors
