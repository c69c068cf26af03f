"""Real weights and real images: the native figures, and the shipped policy's on images it has not learned from."""

import json

import pytest

from tokengame.cli.main import main

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def flags(real_data):
    weights, images = real_data / f"{NAME}.safetensors", real_data / "imagenet_sample.tar"
    model = ["--backbone", NAME, "--weights", str(weights)]
    return [*model, "--images", str(images), "--class-map", str(real_data / "imagenet1k_synsets.txt")]


def test_shipped_policy_on_images_it_has_not_learned_from(flags, capsys):
    """The held-back part of its own training run, named by share and seed in its card."""
    assert main(["eval", *flags, "--policy", NAME, "--holdout", "0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 150
    assert found["top1_native"] == pytest.approx(0.813, abs=0.02)
    assert found["gmacs_ratio"] <= 0.70
    assert found["agreement"] >= 0.94
    assert found["gmacs_ratio_std"] > 0.02, "every image has its own count"
    ratio = found["images_per_second_pruned"] / found["images_per_second_native"]
    assert found["speedup"] == pytest.approx(ratio), "how fast it is here decides nothing"


def test_labels_are_those_of_the_class_map(flags, capsys):
    assert main(["eval", *flags, "--policy", NAME, "--dial", "0", "--holdout", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1_native"] > 0.7
    assert found["drop_pp"] == 0
