"""Fine-tuning a backbone through a frozen policy."""

import copy
import csv
import json
from dataclasses import replace

import pytest
import timm
import torch
from conftest import policy_for
from safetensors.torch import load_file

from tokengame.baselines import BASELINES
from tokengame.cli.main import main
from tokengame.config import AugmentConfig, FinetuneConfig
from tokengame.data.transforms import seeded
from tokengame.errors import TokenGameError
from tokengame.learning.finetune import Tuner, mixing
from tokengame.policies import Policy
from tokengame.runtime import prune

SMALL = FinetuneConfig(updates=13, batch_size=8, lr=1e-4, dtype="float32", warmup=0.0)


def images(number, seed=0):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def tune(model, config=SMALL, transition="merge", labels=None):
    tuner = Tuner(model, policy_for(model, transition), 0.5, config)
    metrics = [tuner.update(images(config.batch_size, step % 2), labels) for step in range(config.updates)]
    return tuner, metrics


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_tuning_brings_the_pruned_prediction_back(transition, model):
    native, before = copy.deepcopy(model.state_dict()), policy_for(model, transition).actor.state_dict()
    tuner, metrics = tune(model, transition=transition)
    assert metrics[-1]["tune/kl"] < 0.5 * metrics[0]["tune/kl"], "on the same images"
    assert metrics[0]["tune/gmacs_ratio"] < 0.95
    assert all(torch.equal(native[name], weight) for name, weight in model.state_dict().items()), "native is untouched"
    assert all(torch.equal(before[name], weight) for name, weight in tuner.fast.actor.state_dict().items())
    assert not torch.equal(tuner.tuned().head.weight, model.head.weight)


def test_labels_are_learned_where_they_have_a_weight(model):
    wanted = (model(images(8)).argmax(1) + 1) % 5
    config = replace(SMALL, labels=1.0, distill=0.0, updates=30)
    tuner = Tuner(model, policy_for(model), 0.5, config)
    metrics = [tuner.update(images(8), wanted) for _ in range(30)]
    assert metrics[0]["tune/top1"] < metrics[-1]["tune/top1"]
    with pytest.raises(TokenGameError, match="needs labelled images"):
        tuner.update(images(8), None)


RECIPE = {
    "distill": 0.0, "labels": 1.0, "augment": AugmentConfig(mixup=0.8, cutmix=1.0, smoothing=0.1, drop_path=0.3)
}  # fmt: skip


@pytest.mark.usefixtures("two_threads")
def test_a_resumed_tuning_by_the_papers_recipe_repeats_what_it_mixes_and_drops(model):
    config, wanted = replace(SMALL, updates=6, **RECIPE), torch.arange(8) % 5
    whole, part, resumed = (Tuner(model, policy_for(model), 0.5, config, seed=3) for _ in range(3))
    found = [whole.update(images(8), wanted) for _ in range(6)]
    for _ in range(2):
        part.update(images(8), wanted)
    torch.manual_seed(99)  # what was drawn elsewhere does not matter
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    for step in range(2, 6):
        assert resumed.update(images(8), wanted)["tune/loss"] == found[step]["tune/loss"]
    assert len({m["tune/loss"] for m in found}) == 6
    for one, other in zip(whole.tuned().parameters(), resumed.tuned().parameters(), strict=True):
        assert torch.equal(one, other)


def test_mixed_labels_are_those_of_mixed_images():
    """Cutmix of images that are each one colour: a label's weight is the share of the pixels that show its colour."""
    config = replace(SMALL, labels=1.0, distill=0.0, augment=AugmentConfig(cutmix=1.0))
    shown = torch.arange(4.0).view(4, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    with seeded(5):
        mixed, weights = mixing(config, 4, 4)(shown, torch.arange(4))
    share = torch.stack([(mixed == c).float().mean((1, 2, 3)) for c in range(4)], 1)
    torch.testing.assert_close(weights, share, atol=1e-3, rtol=0)
    assert ((share > 0).sum(1) > 1).any()


def test_the_loss_is_the_cross_entropy_with_soft_labels(model):
    config = replace(SMALL, labels=1.0, distill=0.0, augment=AugmentConfig(mixup=0.8, smoothing=0.1))
    tuner, wanted = Tuner(model, policy_for(model), 0.5, config), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    with seeded(hash((0, 0, 0)) & 0x7FFFFFFF):
        mixed, soft = mixing(config, 5, 8)(images(8), wanted)
    logits = tuner.fast.predict(mixed).logits
    slow = sum(-float(soft[i, c] * logits[i].log_softmax(0)[c]) for i in range(8) for c in range(5)) / 8
    assert tuner.update(images(8), wanted)["tune/loss"] == pytest.approx(slow, rel=1e-4)


def test_labels_are_smoothed_where_nothing_is_mixed(model):
    config = replace(SMALL, labels=1.0, distill=0.0, augment=AugmentConfig(smoothing=0.2))
    tuner, wanted = Tuner(model, policy_for(model), 0.5, config), torch.arange(8) % 5
    logs = tuner.fast.predict(images(8)).logits.log_softmax(1)
    soft = torch.full((8, 5), 0.2 / 5).scatter_add_(1, wanted[:, None], torch.full((8, 1), 0.8))
    assert tuner.update(images(8), wanted)["tune/loss"] == pytest.approx(float(-(soft * logs).sum(1).mean()), rel=1e-4)


def test_stochastic_depth_drops_whole_images_while_tuning_and_nothing_after(model):
    """At a rate of nearly 1 in the last block, that block adds nothing; measured, the model is as it was."""
    config = replace(SMALL, augment=AugmentConfig(drop_path=0.999), lr=1e-9)
    tuner = Tuner(model, policy_for(model, "drop"), 0.5, config)
    native = tuner.fast.predict(images(8)).logits
    rates = [drop.drop_prob for drop in tuner.drops]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 0.999)
    with tuner._dropping(), seeded(0):
        dropped = tuner.fast.predict(images(8)).logits
    assert not torch.allclose(dropped, native)
    tuner.update(images(8), None)
    torch.testing.assert_close(tuner.fast.predict(images(8)).logits, native)
    assert not any(module.training for module in tuner.student.modules())
    assert tuner.tuned().state_dict().keys() == model.state_dict().keys()


def test_recipes_are_refused_in_one_sentence(model):
    with pytest.raises(TokenGameError, match="mix pairs, and a process has 7 images"):
        Tuner(model, policy_for(model), 0.5, replace(SMALL, batch_size=7, labels=1.0, augment=AugmentConfig(0.8)))
    for block in model.blocks:
        del block.drop_path1, block.drop_path2
        block.drop_path1 = block.drop_path2 = torch.nn.Dropout(0.0)
    with pytest.raises(TokenGameError, match="no place for stochastic depth"):
        Tuner(model, policy_for(model), 0.5, replace(SMALL, augment=AugmentConfig(drop_path=0.1)))
    with pytest.raises(TokenGameError, match="no recipe 'deit'; there are: tokengame, paper"):
        FinetuneConfig.from_recipe("deit")


def test_the_papers_recipe_scales_the_step_size(place, capsys):
    """5e-4 for 512 images is 3.75e-4 for their 384; the figures are from a log of theirs."""
    assert FinetuneConfig.from_recipe("paper").step_size == pytest.approx(3.75e-4)
    root, flags, small = place
    run = ["finetune", *flags, *small, "--policy", str(root / "policy.safetensors"), "--output", str(root / "recipe")]
    assert main([*run, "--recipe", "paper", "--dial", "0.8", "--json"]) == 0
    capsys.readouterr()
    settings = json.loads((root / "recipe" / "log" / "config.json").read_text())["settings"]
    assert settings["augment"] == {"mixup": 0.8, "cutmix": 1, "smoothing": 0.1, "drop_path": 0.1, "remode": "pixel"}
    assert settings["reprob"] == 0.25
    assert (settings["distill"], settings["labels"], settings["recipe"], settings["batch_size"]) == (0, 1, "paper", 4)


def test_the_dial_holds_the_compute(model):
    """Left alone, the compute would end elsewhere: it starts at another than wanted."""
    config = replace(SMALL, updates=60)
    for wanted in (0.55, 0.8):
        tuner = Tuner(model, policy_for(model), 0.5, config, compute=wanted)
        found = [tuner.update(images(8, step), None)["tune/gmacs_ratio"] for step in range(60)]
        assert sum(found[-10:]) / 10 == pytest.approx(wanted, abs=0.04)


def test_the_moving_average_is_what_is_kept(model):
    tuner, _ = tune(model, replace(SMALL, ema=0.9))
    slow, fast = ((m.head.weight - model.head.weight).detach() for m in (tuner.tuned(), tuner.student))
    assert 0 < float(slow.norm()) < float(fast.norm())


@pytest.mark.usefixtures("two_threads")
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
def test_what_timm_does_not_know_is_refused(name, value, model):
    with pytest.raises(TokenGameError, match=f"timm does not make .*{value}"):
        Tuner(model, policy_for(model), 0.5, replace(SMALL, **{name: value}))


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_finetune_writes_weights_and_a_card_that_names_them(place, capsys, recwarn):
    root, flags, small = place
    tuned = root / "tuned"
    run = ["finetune", *flags, *small, "--policy", str(root / "policy.safetensors"), "--output", str(tuned), "--json"]
    assert main([*run, "--dial", "0.8", "--aa", "rand-m9-mstd0.5-inc1", "--ema", "0.9", "--lr", "1e-3"]) == 0
    found = document(capsys)
    assert {"before", "after", "recovered", "model", "policy"} <= set(found)
    assert {"processor", "kernels", "threads", "commit", "command"} <= found["before"].keys() & found["after"].keys()
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


def test_compare_runs_a_tuned_policy_on_its_own_weights(place, capsys, monkeypatch):
    monkeypatch.setattr("tokengame.measure.compare.BASELINES", BASELINES[:1])  # the others have tests of their own
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
