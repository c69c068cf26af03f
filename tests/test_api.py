"""Python first: train, evaluate and calibrate on whatever gives images."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import tokengame
from tokengame.cli.main import main
from tokengame.config import TrainConfig, with_overrides
from tokengame.data.batches import Epochs
from tokengame.data.given import batches_of, opened, some_of
from tokengame.data.loader import TrainingLoader
from tokengame.data.samples import BatchStream, Samples
from tokengame.data.transforms import transform_for
from tokengame.errors import Interrupted, TokenGameError
from tokengame.learning.run import TrainingRun

IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 5
PREPROCESSING = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
                 "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip
CONFIG = with_overrides(
    TrainConfig.from_preset("tokengame"),
    {"game": {"stages": (1, 2)}, "dtype": "float32", "updates": 3, "batch_size": 4, "rollouts": 2},
)


def pictures(number=40):
    pixels = np.random.default_rng(0).integers(0, 255, (number, 40, 36, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


class Rows(Dataset):
    """Dictionaries, as data sets of Hugging Face have them."""

    def __init__(self, key, values, labels):
        self.key, self.values, self.labels, self.opened = key, values, labels, []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        self.opened.append(index)
        return {self.key: self.values[index], "label": int(self.labels[index])}


class Arriving(IterableDataset):
    def __iter__(self):
        yield from zip(IMAGES, LABELS, strict=True)


def forms():
    """Name, images and whether they are tensors, all of them the same 40."""
    rows = Rows("pixel_values", IMAGES, LABELS)
    yield "tensor", IMAGES, True, False
    yield "data set", TensorDataset(IMAGES, LABELS), True, True
    yield "data set without labels", TensorDataset(IMAGES), True, False
    yield "dictionaries", rows, True, True
    yield "loader", DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7), True, True
    yield "loader of dictionaries", DataLoader(rows, batch_size=7), True, True
    yield "loader that arrives", DataLoader(Arriving(), batch_size=7), True, True
    yield "data set that arrives", Arriving(), True, True
    yield "list of batches", list(zip(IMAGES.split(7), LABELS.split(7), strict=True)), True, True
    yield "list of tensors", list(IMAGES), True, False
    yield "PIL images", pictures(), False, False
    yield "data set of PIL images", Rows("image", pictures(), LABELS), False, True


FORMS = [pytest.param(*rest, id=name) for name, *rest in forms()]


@pytest.mark.parametrize(("images", "tensors", "labelled"), FORMS)
def test_every_form_gives_all_images_in_order_with_their_labels(images, tensors, labelled):
    batches = list(batches_of(images, PREPROCESSING).batches)
    found = torch.cat([batch.images for batch in batches])
    transform = transform_for(PREPROCESSING, train=False)
    assert torch.equal(found, IMAGES if tensors else torch.stack([transform(image) for image in pictures()]))
    if labelled:
        assert torch.equal(torch.cat([batch.labels for batch in batches]), LABELS)
    else:
        assert {batch.labels for batch in batches} == {None}
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(40))


@pytest.mark.parametrize(("images", "tensors", "labelled"), FORMS)
def test_every_form_is_learned_from_and_goes_on_where_it_stopped(images, tensors, labelled):
    """Batches of two passes are those of a loader that starts at update 3."""
    source = opened(images)
    transform = transform_for(PREPROCESSING, train=True)
    whole = list(TrainingLoader(source, transform, 0, 8, 10).loader())
    assert [len(batch.images) for batch in whole] == [8] * 10
    rest = list(TrainingLoader(source, transform, 0, 8, 10).loader(3))
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.images, other.images)
    assert all((batch.labels is not None) == labelled for batch in whole)
    if tensors:
        order = torch.tensor(
            [Epochs(40, 80, 0)[i] for i in range(80)] if isinstance(source, Samples) else list(range(40)) * 2
        )
        assert torch.equal(torch.cat([batch.images for batch in whole]), IMAGES[order]), "as they are"


def test_a_sampler_says_which_images_count():
    chosen = [3, 5, 8, 13, 21]
    before = torch.random.get_rng_state()
    source = opened(DataLoader(TensorDataset(IMAGES), sampler=SubsetRandomSampler(chosen), batch_size=2))
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left alone"
    assert torch.equal(torch.stack([source.open(i) for i in range(5)]), IMAGES[chosen])
    assert len(opened(Subset(TensorDataset(IMAGES), chosen)).names) == 5


def test_labels_are_found_without_opening_what_is_not_learned_from():
    rows = Rows("image", pictures(), LABELS)
    source = opened(rows)
    rows.opened.clear()
    learn = source.part(range(8, 40))
    loader = TrainingLoader(learn, transform_for(PREPROCESSING, train=True), 0, 4, 2).loader()
    assert all(torch.equal(batch.labels, LABELS[batch.index + 8]) for batch in loader)
    assert len(rows.opened) == 8 + 1, "each image of a batch once, and one to see what it is"


def test_some_images_are_drawn_from_all_of_a_set_and_are_the_first_of_a_stream():
    drawn = torch.cat([batch.images for batch in some_of(IMAGES, PREPROCESSING, 10).batches])
    assert len(drawn) == 10
    where = [(image == IMAGES).flatten(1).all(1).nonzero().item() for image in drawn]
    assert len(set(where)) == 10
    assert max(where) > 20
    (first,) = some_of(BatchStream(list(IMAGES.split(7))), PREPROCESSING, 10).batches
    assert torch.equal(first.images, IMAGES[:10])


def test_of_a_stream_the_first_images_are_held_back_from_every_pass():
    learn, held = BatchStream(list(IMAGES.split(7))).split(0.2)
    assert torch.equal(torch.stack([held.open(i) for i in range(len(held.names))]), IMAGES[:8])
    rows = torch.stack([row.open() for row in islice(learn.shuffled(0), 64)])
    assert torch.equal(rows, IMAGES[8:].repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (IMAGES.byte(), "images must be a float tensor .* not a uint8 tensor"),
        (IMAGES[0], "images must be a float tensor .* not a float32 tensor"),
        (IMAGES.numpy(), "images= must be .*, not a ndarray|images= must be .*, not an ndarray"),
        ([IMAGES[0].numpy()], "the first of images= is no image .*not an? ndarray"),
        (DataLoader([np.zeros(3)] * 3), "images must be a float tensor"),
        (DataLoader(["a", "b"]), "the first of images= is no image .a tensor is wanted, not a str"),
        ([{"pixels": IMAGES[0]}], "a dictionary needs image or pixel_values, and has pixels"),
        ([], "images= is empty"),
        (IMAGES[:0], "images= is empty"),
        (iter([IMAGES]), "images= is an iterator, which can be read once"),
        ({"image": IMAGES}, "images= must be .*, not a dict"),
        (3, "images= must be a tensor"),
        ("nowhere/at/all", "nowhere/at/all"),
        (torch.randn(9, 1, 32, 32), "images are 1 x 32 x 32, and the model takes 3 x 32 x 32"),
        (torch.randn(9, 3, 64, 64), "images are 3 x 64 x 64, and the model takes 3 x 32 x 32"),
        ([torch.randn(4, 3, 64, 64)] * 2, "images are 3 x 64 x 64, and the model takes 3 x 32 x 32"),
        (IMAGES[:1], "one image cannot be both trained on and held back"),
    ],
)
def test_bad_images_are_one_sentence(model, images, sentence):
    with pytest.raises(TokenGameError, match=sentence) as caught:
        tokengame.train(model, images, config=CONFIG, progress=False)
    assert "\n" not in str(caught.value)


def test_labels_that_are_no_classes_are_one_sentence(model):
    fast = tokengame.prune(model)
    for function in (tokengame.evaluate, tokengame.calibrate):
        with pytest.raises(TokenGameError, match="label 7 is no class of the model"):
            function(fast, TensorDataset(IMAGES, LABELS + 7), progress=False)


def test_train_learns_calibrates_and_leaves_nothing_behind(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    policy = tokengame.train(model, TensorDataset(IMAGES, LABELS), config=CONFIG, holdout=0.25, progress=False)
    rows = policy.card["calibration"]
    assert {row["images"] for row in rows} == {10}
    assert rows[0]["drop_pp_bound95"] is not None, "labels came with the images"
    assert policy.card["training"]["images_seen"] == 12
    assert "training" not in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    middle = (rows[0]["gmacs_ratio"] + rows[-1]["gmacs_ratio"]) / 2
    fast = tokengame.prune(model, policy, gmacs_ratio=middle)
    assert 0 < fast.dial < 1


def test_a_compute_out_of_reach_is_met_as_nearly_as_it_can_be(model):
    with pytest.warns(UserWarning, match="lies outside the calibrated .* the policy recommends"):
        policy = tokengame.train(model, IMAGES, updates=1, batch_size=4, gmacs_ratio=0.05, progress=False)
    assert policy.card["dial"] == policy.card["calibration"][-1]["dial"]


@pytest.mark.parametrize("images", [IMAGES, list(IMAGES.split(8))], ids=["set", "stream"])
def test_a_run_that_is_resumed_ends_as_one_that_is_not(images, model, tmp_path, monkeypatch):
    settings = {"config": CONFIG, "progress": False, "seed": 3}
    whole = tokengame.train(model, images, output=tmp_path / "whole.safetensors", **settings)
    update, done = tokengame.learning.trainer.Trainer.update, []

    def interrupted(self, *arguments):
        if len(done) == 2:
            raise Interrupted("stopped", 2)
        done.append(update(self, *arguments))
        return done[-1]

    output = tmp_path / "parts.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("tokengame.learning.trainer.Trainer.update", interrupted)
        patch.setattr("tokengame.learning.loop.Loop._run", saving(tokengame.learning.loop.Loop._run))
        with pytest.raises(Interrupted):
            tokengame.train(model, images, output=output, **settings)
    with pytest.raises(TokenGameError, match="of an earlier run"):
        tokengame.train(model, images, output=output, **settings)
    resumed = tokengame.train(model, images, output=output, resume=True, **settings)
    assert torch.equal(resumed.actor.weight, whole.actor.weight)
    assert resumed.card["calibration"] == whole.card["calibration"]
    logs = [(tmp_path / f"{name}_log" / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def saving(run):
    """The loop, which saves what is done when it is interrupted between updates."""

    def saved(self, progress, what, _every):
        return run(self, progress, what, 1)

    return saved


def test_resuming_needs_a_place(model):
    with pytest.raises(TokenGameError, match="resume= continues the run of output="):
        tokengame.train(model, IMAGES, resume=True)


def test_evaluate_measures_what_the_loader_gives_as_the_command_does(model):
    fast = tokengame.prune(model)
    found = tokengame.evaluate(fast, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16), progress=False)
    with torch.inference_mode():
        native, pruned = model(IMAGES).argmax(1), fast(IMAGES).argmax(1)
    assert found["images"] == 40
    assert found["top1_native"] == pytest.approx(float((native == LABELS).float().mean()))
    assert found["agreement"] == pytest.approx(float((native == pruned).float().mean()))
    assert found["batch_size"] == 16
    assert json.loads(json.dumps(found))["dial"] == 0.5


def test_the_keys_are_those_of_the_command(capsys):
    flags = ["--backbone", "fashion", "--images", "fashion", "--holdout", "0.004", "--policy", "rule", "--json"]
    assert main(["eval", *flags]) == 0
    command = json.loads(capsys.readouterr().out)
    fast = tokengame.prune(tokengame.backbones.load_model("fashion"))
    source = tokengame.data.datasets.open_images("fashion")
    held = tokengame.data.datasets.split_images(source, 0.004, 0)[1]
    found = tokengame.evaluate(fast, held, progress=False)
    assert set(found) == set(command)
    for key in ("images", "top1_native", "agreement", "gmacs_ratio"):
        assert found[key] == command[key]
    assert found["kl"] == pytest.approx(command["kl"], abs=1e-5)


def test_calibrate_gives_a_policy_that_meets_targets(model, tmp_path):
    fast = tokengame.prune(model, images=IMAGES, progress=False)
    attention, dial = fast.game.attention, fast.dial
    policy = tokengame.calibrate(fast, TensorDataset(IMAGES, LABELS), progress=False)
    assert (fast.game.attention, fast.dial, fast.card["calibration"]) == (attention, dial, [])
    policy.save(tmp_path / "rule.safetensors")
    wanted = policy.card["calibration"][12]["gmacs_ratio"]
    again = tokengame.prune(model, tmp_path / "rule.safetensors", gmacs_ratio=wanted)
    native, macs = again.macs(again.predict(IMAGES))
    assert float(macs.mean()) / native == pytest.approx(wanted, abs=0.02)
    with pytest.raises(TokenGameError, match="calibrate takes a model that is pruned by a policy"):
        tokengame.calibrate(tokengame.runtime.prune_by(model, CONFIG.game, lambda obs: obs.attention), IMAGES)


def test_progress_is_shown_unless_it_is_not_wanted(model, capfd):
    fast = tokengame.prune(model)
    for images in (IMAGES, DataLoader(Arriving(), batch_size=20)):
        tokengame.evaluate(fast, images)
        assert "measuring: 1" in capfd.readouterr().err
        tokengame.evaluate(fast, images, progress=False)
        assert "measuring" not in capfd.readouterr().err


def test_a_folder_is_labelled_where_its_classes_are_the_models(tmp_path):
    for number, image in enumerate(pictures(10)):
        (tmp_path / f"class{number % 5}").mkdir(exist_ok=True)
        image.save(tmp_path / f"class{number % 5}" / f"{number}.png")
    fast = tokengame.prune(tiny_vit())
    assert tokengame.evaluate(fast, tmp_path, progress=False)["top1_native"] is not None
    assert tokengame.evaluate(fast, tmp_path / "class0", progress=False)["top1_native"] is None
    policy = tokengame.train(tiny_vit(), str(tmp_path), updates=1, batch_size=2, progress=False)
    assert policy.card["backbone"]["name"] == "vit_tiny_patch16_224"


def test_the_command_and_the_function_learn_the_same(model, tmp_path):
    """A run of the same source, settings and seed."""
    learn, held = tokengame.data.datasets.split_images(Samples(IMAGES), 0.2, 5)
    run = TrainingRun(model, "tiny", CONFIG, learn, tmp_path / "run.safetensors", seed=5, workers=0)
    run.run()
    run.finish(held)
    policy = tokengame.train(model, IMAGES, config=CONFIG, seed=5, progress=False)
    assert torch.equal(policy.actor.weight, run.trainer.actor.weight)
