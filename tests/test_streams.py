"""Streams: every image once a pass, repeatable, the same with any number of workers and processes, resumed exactly."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokengame.cli.main import main
from tokengame.data import hub
from tokengame.data.batches import BadImages, checked
from tokengame.data.datasets import label_images, open_images, split_images
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
