"""The sweep of alpha / beta, the paper's tables and its gallery of tokens."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import policy_for, tiny_vit
from PIL import Image

from tokengame.cli.main import main
from tokengame.data.batches import Batch
from tokengame.learning.trainer import Trainer
from tokengame.measure.scores import Scores
from tokengame.measure.sweep import equilibrium, reading, sweep_row
from tokengame.report.gallery import draw
from tokengame.report.html import markdown, paper_rows
from tokengame.runtime import prune


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_train_rehearses_and_keeps_nothing(place, capsys):
    root, flags, small = place
    output = root / "rehearsed.safetensors"
    assert main(["train", *flags, *small, "--output", str(output), "--dry-run", "--json"]) == 0
    found = document(capsys)
    assert found["images"] == 8
    speed = min(found["images_per_second"], found["images_per_second_decoded"])
    assert found["hours"] == pytest.approx(8 / speed / 3600)
    assert found["memory_gib"] > 0.1
    assert not list(root.glob("rehearsed*"))


def test_the_imagenet_recipe_rehearses(place, tmp_path):
    """With random weights and a smaller network than DeiT-S, which the scripts beside it name."""
    root, _, _ = place
    script = Path(__file__).parents[1] / "runs" / "imagenet.sh"
    settings = {
        "TRAIN": str(root / "images"), "VAL": str(root / "images"), "WEIGHTS": str(root / "weights.safetensors"),
        "OUT": str(tmp_path), "BATCH": "4", "WORKERS": "0", "BIN": str(Path(sys.executable).parent),
    }  # fmt: skip
    command = ["bash", str(script), "vit_tiny_patch16_224", "0.65", "--dry-run"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("memory_gib") == 2, "training and fine-tuning"
    assert f"{1281167 // 4 * 4}" in done.stderr, "an epoch of reinforcement learning"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["rehearsal.safetensors"]


def test_sweep_trains_one_policy_for_each_ratio_and_none_twice(tmp_path, capsys):
    small = ["--holdout", "0.004", "--batch-size", "4", "--updates", "2", "--workers", "0"]
    run = ["sweep", "--backbone", "fashion", "--images", "fashion", *small, "--ratios", "50", "400", "--json"]
    run += ["--output", str(tmp_path)]
    assert main(run) == 0
    rows = document(capsys)
    assert [row["alpha_over_beta"] for row in rows] == [50, 400]
    assert {"keep", "keep_sampled", "keep_predicted", "earned", "reading", "gmacs_ratio", "tokens_kept"} <= set(rows[0])
    assert {"processor", "kernels", "threads", "commit", "command"} <= set(rows[0])
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 1000
    timings = (tmp_path / "alpha50_log" / "timings.jsonl").read_text()
    assert main(run) == 0
    assert document(capsys)[0]["keep"] == rows[0]["keep"]
    assert (tmp_path / "alpha50_log" / "timings.jsonl").read_text() == timings, "no update took place again"


def test_an_interrupted_sweep_resumes_within_a_run(tmp_path, monkeypatch):
    small = ["--holdout", "0.004", "--batch-size", "4", "--updates", "3", "--workers", "0"]
    run = ["sweep", "--backbone", "fashion", "--images", "fashion", *small, "--ratios", "50", "--output"]
    update = Trainer.update

    def stopped(self, images, labels):
        metrics = update(self, images, labels)
        if self.updates == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(Trainer, "update", stopped)
    assert main([*run, str(tmp_path / "part")]) == 130
    monkeypatch.setattr(Trainer, "update", update)
    log = tmp_path / "part" / "alpha50_log" / "timings.jsonl"
    before = log.read_text()
    assert before.count("\n") == 2
    for name in ("part", "whole"):
        assert main([*run, str(tmp_path / name)]) == 0
    assert log.read_text().startswith(before)
    policies = [(tmp_path / name / "alpha50.safetensors").read_bytes() for name in ("part", "whole")]
    assert policies[0] == policies[1]


def test_equilibrium_by_hand():
    assert equilibrium(100, 1, 0.5, 196) == 50
    assert equilibrium(100, 2, 0.8, 196) == 40
    assert equilibrium(400, 1, 0.9, 196) == 196, "no more than there are"


def test_a_point_of_the_sweep_by_hand():
    """Two images of eight tokens: one keeps four and is right, one keeps two and is wrong."""
    scores = Scores(
        index=[0, 1], correct_native=[True, True], correct_pruned=[True, False], agree=[True, False], kl=[0.0, 0.1],
        confidence=[0.5, 0.6], macs=[4.0, 2.0], kept=[[6, 4], [5, 2]], macs_native=8.0, tokens=8,
    )  # fmt: skip
    sampled = [{"game/kept_0": 0.6, "game/kept_1": k, "game/top1": p} for k, p in ((0.3, 0.4), (0.5, 0.6))]
    row = sweep_row(6.0, 1.0, scores, sampled)
    assert row["keep"] == 3 / 8
    assert row["keep_sampled"] == pytest.approx(0.4)
    assert row["keep_predicted"] == pytest.approx(6 * 0.5 / 8)
    assert row["earned"] == pytest.approx((6 / 4 + 0) / 2)
    assert "as predicted" in row["reading"]


@pytest.mark.parametrize(
    ("predicted", "keep", "earned", "says"),
    [
        (1.0, 0.99, 1.4, "pays for all tokens"),
        (1.0, 0.5, 1.4, "has not learned so yet"),
        (0.5, 0.5, 1.02, "in equilibrium"),
        (0.5, 0.3, 1.6, "pruning is final"),
        (0.3, 0.6, 0.5, "more should be pruned"),
        (0.002, 0.005, 0.0, "collapsed"),
        (0.002, 0.6, 0.0, "more should be pruned"),
    ],
)
def test_readings(predicted, keep, earned, says):
    assert says in reading({"keep_predicted": predicted, "keep": keep, "earned": earned})


def test_the_papers_table_by_hand():
    common = {"top1_native": 0.8, "gmacs_native": 4.6, "images_per_second_native": 100.0}
    rows = [
        {"method": "ours", "setting": "dial 0.5", "top1_pruned": 0.79, "drop_pp": 1.0, "gmacs_pruned": 2.3,
         "images_per_second_pruned": 180.0, "speedup": 1.8, **common},
        {"method": "untimed", "setting": "", "top1_pruned": 0.81, "drop_pp": -1.0, "gmacs_pruned": 3.0, **common},
    ]  # fmt: skip
    assert markdown(paper_rows(rows)).splitlines() == [
        "| Method | Top-1 (%) | Change | GMACs | Images/s | Change (%) |",
        "| --- | --- | --- | --- | --- | --- |",
        "| native | 80.00 |  | 4.600 | 100.0 |  |",
        "| ours, dial 0.5 | 79.00 | -1.00 | 2.300 | 180.0 | +80.0 |",
        "| untimed | 81.00 | +1.00 | 3.000 |  |  |",
    ]


def test_gallery_counts_and_predictions_beside_dynamicvit(place, capsys):
    root, flags, _ = place
    page = root / "gallery.html"
    run = ["show", *flags, "--policy", str(root / "policy.safetensors"), "--dial", "0.9", "--count", "3", "--json"]
    assert main([*run, "--side", "60", "--output", str(page), "--dynamicvit-updates", "1"]) == 0
    assert document(capsys)["files"] == [str(page)]
    text = page.read_text()
    assert text.count("data:image/png") == 6
    ours = re.findall(r"tokengame: ([\d → ]+) tokens", text)
    theirs = re.findall(r"DynamicViT, frozen: ([\d → ]+) tokens", text)
    assert len(ours) == len(theirs) == 3
    for counts in (*ours, *theirs):
        numbers = [int(n) for n in counts.split(" → ")]
        assert numbers[0] == 196
        assert numbers == sorted(numbers, reverse=True)
    assert len({tuple(counts.split()) for counts in theirs}) == 1, "DynamicViT keeps the same number in every image"


@pytest.mark.parametrize(("size", "patch"), [((24, 40), 8), ((42, 28), 14)])
def test_drawings_fit_any_resolution_and_patch(size, patch):
    model = tiny_vit(img_size=size, patch_size=patch)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *size)}
    policy = policy_for(model)
    policy.card["agents"] = model.patch_embed.num_patches
    batch = Batch(torch.randn(2, 3, *size), None, torch.tensor([5, 3]))
    drawings = draw(prune(model, replace(policy)), batch, side=50)
    assert [drawing.index for drawing in drawings] == [5, 3]
    width = round(size[1] * 50 / size[0])
    assert drawings[0].picture.width == 3 * width + 2 * 6
    assert drawings[0].counts[0] == model.patch_embed.num_patches
    assert all(0 < d.compute <= 1.05 and 0 < d.pruned[1] <= 1 for d in drawings)
