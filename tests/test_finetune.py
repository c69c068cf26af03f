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
from tokengame.config import FinetuneConfig
from tokengame.errors import TokenGameError
from tokengame.learning.finetune import Tuner
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
