"""What a command says when it has trained, and that a second one does not replace the first by accident."""

import json
import os
import shlex

import pytest
import torch

from tokengame.cli.main import main, parse
from tokengame.measure import compare
from tokengame.report.console import progress

ON_IMAGES = ["--backbone", "fashion", "--images", "fashion", "--workers", "0", "--device", "cpu"]
SMALL = ["--batch-size", "4", "--updates", "1", "--holdout", "0.01", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and a tuned model in a folder whose name needs quotes."""
    root = tmp_path_factory.mktemp("a folder's")
    assert main(["train", *ON_IMAGES, *SMALL, "--seed", "2", "--output", str(root / "policy.safetensors")]) == 0
    return root


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_train_refuses_a_second_run_and_goes_on_where_that_is_wanted(folder, capsys):
    train = ["train", *ON_IMAGES, *SMALL, "--seed", "2", "--output", str(folder / "policy.safetensors")]
    before = files(folder)
    assert main(train) == 2
    shown = " ".join(said(capsys))
    assert "of an earlier run" in shown
    assert "--resume" in shown
    assert "--overwrite" in shown
    assert main([*train, "--resume", "--overwrite"]) == 2
    assert "give one of --resume and --overwrite" in " ".join(said(capsys))
    assert files(folder) == before
    assert main([*train, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images_seen"] == 4


def test_train_ends_with_the_command_that_measures_the_policy(folder, capsys):
    train = ["train", *ON_IMAGES, *SMALL, "--seed", "2", "--output", str(folder / "policy.safetensors"), "--overwrite"]
    assert main(train) == 0
    lines = said(capsys)
    assert f"policy: {folder / 'policy.safetensors'}" in lines
    words = shlex.split(lines[-1].removeprefix("next: "))
    assert words[0] == "tokengame"
    command = parse(words[1:])
    assert (command.name, command.policy) == ("eval", str(folder / "policy.safetensors"))
    assert (command.backbone, command.images, command.device) == ("fashion", "fashion", "cpu")
    assert (command.holdout, command.seed) == (0.01, 2)
    assert command.weights is None
    found = json.loads((folder / "policy_log" / "config.json").read_text())
    assert {"backbone": "fashion", "images": "fashion", "seed": 2, "class_map": None}.items() <= found.items()


def test_finetune_likewise(folder, capsys):
    tune = ["finetune", *ON_IMAGES, *SMALL, "--policy", str(folder / "policy.safetensors"), "--dial", "0.5"]
    tune += ["--output", str(folder / "tuned")]
    assert main(tune) == 0
    lines = said(capsys)
    command = parse(shlex.split(lines[-1].removeprefix("next: "))[1:])
    assert command.policy == str(folder / "tuned" / "policy.safetensors")
    assert (command.holdout, command.seed) == (0.01, 0)
    assert f"weights: {folder / 'tuned' / 'model.safetensors'}" in lines
    before = files(folder)
    assert main(tune) == 2
    assert "model.safetensors is of an earlier run" in " ".join(said(capsys))
    assert files(folder) == before


def test_an_interrupted_comparison_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINES", compare.BASELINES[:1])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "time_method", interrupt)
    assert main(["compare", *ON_IMAGES, "--holdout", "0.01", "--output", str(tmp_path)]) == 130
    assert os.listdir(tmp_path) == ["compare.csv"]
    assert "agreement" in (tmp_path / "compare.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(("total", "lines"), [(0, 0), (1, 1), (25, 10), (1000, 10)])
def test_where_there_is_no_terminal_a_line_says_how_far_it_is(total, lines, capsys):
    assert sum(1 for _ in progress(range(total), lambda: "training  KL 0.010", total)) == total
    found = said(capsys)
    assert len(found) == lines
    assert all(line.startswith("training  KL 0.010: ") for line in found)
    assert not found or found[-1].startswith(f"training  KL 0.010: {total} of {total}, 0:00:00 left")


def test_embedding_models_are_refused_by_commands_that_compare_classes(tmp_path, capsys, monkeypatch):
    """Where the weights hold no head."""
    import timm

    monkeypatch.setattr(
        "tokengame.backbones.embedded.build_embedded",
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=112, patch_size=8, num_classes=0, depth=1),
    )
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=112, patch_size=8, num_classes=0, depth=1)
               .state_dict(), weights)  # fmt: skip
    model = [*ON_IMAGES, "--weights", str(weights), "--output"]
    for command in ("sweep", "ablate"):
        assert main([command, *model, str(tmp_path / command)]) == 2
        assert "has no classifier" in " ".join(said(capsys)), command
