"""Fine-tuning through a policy, the sweep of alpha / beta, the paper's tables and its gallery of tokens."""

import copy
import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_vit
from PIL import Image
from safetensors.torch import load_file, save_file

from tokengame import prune
from tokengame.cli import main
from tokengame.config import FinetuneConfig, TrainConfig, merge
from tokengame.data import Batch
from tokengame.errors import TokenGameError
from tokengame.evaluate import Scores
from tokengame.finetune import Tuner
from tokengame.gallery import draw
from tokengame.networks import build_actor
from tokengame.policy import Policy, actor_shape, fingerprint
from tokengame.report import markdown, paper_rows
from tokengame.sweep import equilibrium, reading, sweep_row
from tokengame.train import Trainer

SMALL = FinetuneConfig(updates=13, batch_size=8, lr=1e-4, dtype="float32", warmup=0.0)


def policy_for(model, transition="merge"):
    """An untrained policy that prunes about a third at each of two stages."""
    config = merge(TrainConfig.from_preset("tokengame"), {"game": {"stages": (1, 2), "transition": transition}})
    trainer = Trainer(model, replace(config, dtype="float32"))
    shape = trainer.backbone.shape()
    card = {
        "format": 1, "game_version": 4,
        "backbone": {"name": "tiny", "shape": shape, "fingerprint": fingerprint(trainer.backbone)},
        "game": {"stages": [1, 2], "transition": transition},
        "actor": {"observation": "context", "hidden": [32], "keep_logit": 0.0}, "agents": 16, "training": {},
        "calibration": [], "dial": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    config = merge(config.actor, {"keep_logit": 0.0})
    return Policy(build_actor(config, actor_shape(card)).eval(), card)


def images(number, seed=0):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def tune(model, config=SMALL, transition="merge", labels=None):
    tuner = Tuner(model, policy_for(model, transition), 0.5, config)
    metrics = [tuner.update(images(config.batch_size, step % 2), labels) for step in range(config.updates)]
    return tuner, metrics


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_tuning_brings_the_pruned_prediction_back(transition, model):
    native, before = copy.deepcopy(model.state_dict()), policy_for(model).actor.state_dict()
    tuner, metrics = tune(model, transition=transition)
    assert metrics[-1]["tune/kl"] < 0.5 * metrics[0]["tune/kl"], "on the same images"
    assert metrics[0]["tune/gmacs_ratio"] < 0.95
    assert all(torch.equal(native[name], weight) for name, weight in model.state_dict().items()), "native is untouched"
    assert all(torch.equal(before[name], weight) for name, weight in tuner.fast.actor.state_dict().items())
    assert not torch.equal(tuner.tuned().head.weight, model.head.weight)


def test_labels_pull_where_they_are_weighed(model):
    wanted = (model(images(8)).argmax(1) + 1) % 5
    config = replace(SMALL, labels=1.0, distill=0.0, updates=30)
    tuner = Tuner(model, policy_for(model), 0.5, config)
    metrics = [tuner.update(images(8), wanted) for _ in range(30)]
    assert metrics[0]["tune/top1"] < metrics[-1]["tune/top1"]
    with pytest.raises(TokenGameError, match="needs labelled images"):
        tuner.update(images(8), None)


def test_the_dial_holds_the_compute(model):
    """The policy alone would settle elsewhere: it starts at other compute than wanted."""
    config = replace(SMALL, updates=60)
    for wanted in (0.55, 0.8):
        tuner = Tuner(model, policy_for(model), 0.5, config, compute=wanted)
        found = [tuner.update(images(8, step), None)["tune/gmacs_ratio"] for step in range(60)]
        assert sum(found[-10:]) / 10 == pytest.approx(wanted, abs=0.04)


def test_the_moving_average_is_what_is_kept(model):
    tuner, _ = tune(model, replace(SMALL, ema=0.9))
    slow, fast = ((m.head.weight - model.head.weight).detach() for m in (tuner.tuned(), tuner.student))
    assert 0 < float(slow.norm()) < float(fast.norm())


def test_a_resumed_tuning_ends_where_an_uninterrupted_one_does(model):
    config = replace(SMALL, ema=0.9, sched="cosine", warmup=0.2)
    whole, _ = tune(model, config)
    part = Tuner(model, policy_for(model), 0.5, config)
    for step in range(5):
        part.update(images(8, step % 2), None)
    resumed = Tuner(model, policy_for(model), 0.5, config)
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    for step in range(5, 13):
        resumed.update(images(8, step % 2), None)
    for one, other in zip(whole.tuned().parameters(), resumed.tuned().parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sched", ["none", "step", "multistep"])
def test_schedules_by_name(sched, model):
    tuner, _ = tune(model, replace(SMALL, sched=sched))
    sizes = {group["lr"] for group in tuner.optimizer.param_groups}
    assert sizes == {SMALL.lr} if sched == "none" else max(sizes) < SMALL.lr / 2


@pytest.mark.parametrize(("name", "value"), [("opt", "magic"), ("sched", "magic")])
def test_what_timm_does_not_know_is_said(name, value, model):
    with pytest.raises(TokenGameError, match=f"timm does not make .*{value}"):
        Tuner(model, policy_for(model), 0.5, replace(SMALL, **{name: value}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights, labelled images and a policy for the small model that is timm's by name."""
    root = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), root / "weights.safetensors")
    for name in "abcde":
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng((i, ord(name))).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    flags = ["--backbone", "vit_tiny_patch16_224", "--weights", str(root / "weights.safetensors"),
             "--images", str(root / "images"), "--workers", "0"]  # fmt: skip
    small = ["--updates", "2", "--batch-size", "4"]
    assert main(["train", *flags, *small, "--output", str(root / "policy.safetensors"), "--rollouts", "2"]) == 0
    return root, flags, small


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_finetune_writes_weights_and_a_card_that_names_them(place, capsys, recwarn):
    root, flags, small = place
    tuned = root / "tuned"
    run = ["finetune", *flags, *small, "--policy", str(root / "policy.safetensors"), "--output", str(tuned), "--json"]
    assert main([*run, "--dial", "0.8", "--aa", "rand-m9-mstd0.5-inc1", "--ema", "0.9", "--lr", "1e-3"]) == 0
    found = document(capsys)
    assert {"before", "after", "recovered", "model", "policy"} <= set(found)
    assert found["before"]["images"] == found["after"]["images"] == 4
    assert found["before"]["top1_native"] == found["after"]["top1_native"], "native is the model as it came"
    policy = Policy.load(tuned / "policy.safetensors")
    assert policy.card["backbone"]["weights"] == "model.safetensors"
    ratios = [found[when]["gmacs_ratio"] for when in ("before", "after")]
    assert ratios[1] == pytest.approx(ratios[0], abs=0.05), "compared at the same compute"
    assert policy.card["calibration"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    model.load_state_dict(load_file(tuned / "model.safetensors"))
    prune(model, policy)
    assert not [w for w in recwarn if "other weights" in str(w.message)], "card and weights belong together"
    assert main([*run, "--output", str(root / "rehearsed"), "--dry-run"]) == 0
    assert {"hours", "images_per_second", "memory_gib"} <= set(document(capsys))
    assert not (root / "rehearsed").exists()
    evaluation = ["eval", *flags, "--policy", str(tuned / "policy.safetensors"), "--json"]
    assert main(evaluation) == 0
    assert document(capsys)["top1_native"] == pytest.approx(0.2, abs=0.2)
    assert not [w for w in recwarn if "other weights" in str(w.message)], (
        "eval finds the tuned weights beside the policy"
    )


def test_compare_runs_a_tuned_policy_on_its_own_weights(place, capsys):
    root, flags, small = place
    tuned, policy = root / "again", root / "policy.safetensors"
    run = ["finetune", *flags, *small, "--policy", str(policy), "--output", str(tuned)]
    assert main([*run, "--dial", "0.9", "--lr", "1e-2"]) == 0
    both = ["--policies", str(policy), str(tuned / "policy.safetensors"), "--dials", "0.001", "0.9", "--no-timing"]
    assert main(["compare", *flags, *both, "--output", str(root / "compare"), "--json"]) == 0
    rows = {(row["method"], row["setting"]): row for row in document(capsys)}
    kept, moved = (rows[name, "dial 0.001"]["kl"] for name in ("policy", "policy, fine-tuned"))
    assert kept < 1e-4 < moved, "with nearly all tokens only the tuned weights differ from native"
    table = (root / "compare" / "table.md").read_text().splitlines()
    assert table[0] == "| Method | Top-1 (%) | Change | GMACs | Images/s | Change (%) |"
    assert len(table) == len(rows) + 3
    with (root / "compare" / "table.csv").open() as file:
        assert next(csv.DictReader(file))["Method"] == "native"


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
        "OUT": str(tmp_path), "BATCH": "8", "WORKERS": "0", "BIN": str(Path(sys.executable).parent),
    }  # fmt: skip
    command = ["bash", str(script), "vit_tiny_patch16_224", "0.65", "--dry-run"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("memory_gib") == 2, "training and fine-tuning"
    assert f"{1281167 // 8 * 8}" in done.stderr, "an epoch of reinforcement learning"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["rehearsal.safetensors"]


def test_sweep_trains_a_policy_a_ratio_once(place, capsys):
    root, flags, small = place
    run = ["sweep", *flags, *small, "--ratios", "50", "400", "--output", str(root / "sweep"), "--json"]
    assert main(run) == 0
    rows = document(capsys)
    assert [row["alpha_over_beta"] for row in rows] == [50, 400]
    assert {"keep", "keep_sampled", "keep_predicted", "earned", "reading", "gmacs_ratio", "tokens_kept"} <= set(rows[0])
    with Image.open(root / "sweep" / "sweep.png") as picture:
        assert picture.width > 1000
    stamp = (root / "sweep" / "alpha50.safetensors").stat().st_mtime_ns
    assert main(run) == 0
    assert document(capsys)[0]["keep"] == rows[0]["keep"]
    assert (root / "sweep" / "alpha50.safetensors").stat().st_mtime_ns == stamp, "finished runs are not repeated"


def test_equilibrium_by_hand():
    assert equilibrium(100, 1, 0.5, 196) == 50
    assert equilibrium(100, 2, 0.8, 196) == 40
    assert equilibrium(400, 1, 0.9, 196) == 196, "no more than there are"


def test_a_point_of_the_sweep_by_hand():
    """Two images of eight tokens: four survive and are right, two survive and are wrong."""
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
        (1.0, 0.99, 1.4, "all tokens can live"),
        (1.0, 0.5, 1.4, "has not taught"),
        (0.5, 0.5, 1.02, "in equilibrium"),
        (0.5, 0.3, 1.6, "cannot return"),
        (0.3, 0.6, 0.5, "should leave"),
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
