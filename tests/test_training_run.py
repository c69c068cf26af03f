"""A training run on disk: same seed same policy, resumable, nothing half-written, and it learns."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from tokengame.config import PRESETS, TrainConfig, with_overrides
from tokengame.data.datasets import FolderImages
from tokengame.errors import TokenGameError
from tokengame.files import require_writable
from tokengame.learning.rollout import initialise_biases, sample_games
from tokengame.learning.run import TrainingRun
from tokengame.learning.trainer import Trainer, training_dtype
from tokengame.measure.fidelity import fidelity_loss

SMALL = {"updates": 4, "batch_size": 4, "dtype": "float32", "game": {"stages": (1, 2)}}


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return FolderImages(tmp_path, [f"{i}.png" for i in range(8)], [i % 5 for i in range(8)])


def run_for(model, source, folder, preset="tokengame", resume=False, overwrite=False, **changes):
    config = with_overrides(with_overrides(TrainConfig.from_preset(preset), SMALL), changes)
    return TrainingRun(
        model, "tiny", config, source, folder / "policy.safetensors", seed=3, resume=resume, overwrite=overwrite,
        workers=0,
    )  # fmt: skip


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.trainer.actor.parameters()])


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains_and_writes_policy_metrics_and_calibration(preset, model, source, tmp_path):
    run = run_for(model, source, tmp_path / "run", preset)
    before = weights_of(run).clone()
    run.run()
    fast = run.finish(source)
    assert not torch.equal(before, weights_of(run))
    assert fast(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    lines = [json.loads(line) for line in (run.log.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    standard = {"policy", "value", "entropy", "approx_kl", "clipfrac", "explained_variance"}
    assert {f"losses/{name}" for name in standard} <= set(lines[0])
    assert list(run.log.path.glob("events.*")), "TensorBoard"
    assert {"dial", "gmacs_ratio", "gmacs", "keep", "agreement", "drop_pp", "drop_pp_bound95"} <= set(
        fast.card["calibration"][0]
    )
    assert run.result()["images_seen"] == 16


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_training_starts_with_the_wanted_shares(transition, model, source, tmp_path):
    """On any backbone: the root of `keep` at the first stage, then `keep` of those left, over the whole batch."""
    game, images = {"transition": transition}, torch.randn(6, 3, 32, 32)
    trainer = run_for(model, source, tmp_path, game=game).trainer
    initialise_biases(trainer.game, trainer.actor, images, 0.6, trainer.processes)
    state = trainer.game.play(images, trainer.actor)
    first, second = (int(kept.sum()) for kept in state.kept)
    assert first == pytest.approx(0.6**0.5 * 6 * 16, abs=1)
    assert second == pytest.approx(0.6 * first, abs=1)
    assert len({tuple(kept.tolist()) for kept in state.kept[0].split(1)}) > 1, "not the same number in every image"


@torch.no_grad()
def test_calibrated_thresholds_keep_as_many_as_sampling_did(model, source, tmp_path):
    """At the end of a run a deterministic game keeps the shares that sampled games kept before."""
    trainer = run_for(model, source, tmp_path).trainer
    assert not trainer.calibrated
    batches = [torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    trainer.actor.weight.data[:, -1] += 1.5  # sampling prunes some tokens of high probability, a threshold none
    noise = torch.rand(2, 32, 16, generator=torch.Generator().manual_seed(9))
    sampled = [sample_games(trainer.game, trainer.game.reset(images), trainer.actor, noise).final for images in batches]
    wanted = torch.stack([torch.stack(end.kept).float().mean(1) for end in sampled]).mean(0) / 16

    def shares():
        ends = [trainer.game.play(images, trainer.actor) for images in batches]
        return torch.stack([torch.stack(end.kept).float().mean(1) for end in ends]).mean(0) / 16

    before = shares()
    trainer.calibrate_biases(batches)
    assert trainer.calibrated
    torch.testing.assert_close(shares(), wanted, atol=0.03, rtol=0)
    assert float((before - wanted).abs().max()) > 0.06


@pytest.mark.usefixtures("two_threads")
def test_a_finished_run_that_is_resumed_is_not_calibrated_again(model, source, tmp_path):
    first = run_for(model, source, tmp_path)
    first.run()
    resumed = run_for(model, source, tmp_path, resume=True)
    resumed.run()
    assert torch.equal(weights_of(first), weights_of(resumed))


@pytest.mark.usefixtures("two_threads")
def test_same_seed_same_policy(model, source, tmp_path):
    runs = [run_for(model, source, tmp_path / name) for name in ("a", "b")]
    for run in runs:
        run.run()
    assert torch.equal(*map(weights_of, runs))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(number, model, source, tmp_path):
    whole, part = (run_for(model, source, tmp_path / name) for name in ("whole", "part"))
    whole.run()

    steer = part.trainer.controller.update

    def interrupt(kl):
        """In the middle of the second update, networks already stepped; it is finished and saved."""
        if part.trainer.updates == 1:
            os.kill(os.getpid(), number)
        steer(kl)

    part.trainer.controller.update = interrupt
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    resumed = run_for(model, source, tmp_path / "part", resume=True)
    assert resumed.trainer.updates == 2
    resumed.run()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    losses = [
        [json.loads(line)["losses/policy"] for line in (run.log.path / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_resume_refuses_a_missing_checkpoint_and_other_settings(model, source, tmp_path):
    with pytest.raises(TokenGameError, match="nothing to resume"):
        run_for(model, source, tmp_path / "run", resume=True)
    run_for(model, source, tmp_path / "run").run()
    with pytest.raises(TokenGameError, match="of other settings"):
        run_for(model, source, tmp_path / "run", resume=True, rollouts=3)


def test_unwritable_output_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenGameError, match="cannot write"):
        require_writable(tmp_path / "file" / "policy.safetensors")


def test_labelled_reward_without_labels_is_refused_before_training(model, source, tmp_path):
    source.labels = None
    with pytest.raises(TokenGameError, match="needs labels"):
        run_for(model, source, tmp_path / "run", "rl4evit")
    run_for(model, source, tmp_path / "run", "tokengame").run()


def test_share_learns_to_prune_where_keeping_costs_and_to_keep_where_it_pays(model, source, tmp_path):
    """beta alone prunes all tokens, alpha alone keeps all: the two terms of RL4EViT's reward, each on its own."""
    kept = {}
    labels = model(torch.stack([torch.zeros(3, 32, 32)])).argmax(1).item()
    source.labels = [labels] * 8
    for name, reward in {"cost": {"alpha": 0.0, "beta": 1.0}, "gain": {"alpha": 100.0, "beta": -1.0}}.items():
        ppo = {"lr": 3e-3, "entropy": 0.0}
        run = run_for(model, source, tmp_path / name, "rl4evit", updates=25, reward=reward, ppo=ppo)
        run.run()
        kept[name] = run.loop.metrics["game/kept_1"]
    assert kept["cost"] < 0.15 < 0.6 < kept["gain"]


@torch.no_grad()
def test_agents_pay_for_softened_predictions_and_each_network_has_its_own_step_size(model):
    """What is charged is KL at the reward's temperature; what is reported and steered is plain KL."""
    config = with_overrides(TrainConfig.from_preset("tokengame"), {"game": {"stages": (1, 2)}, "dtype": "float32"})
    trainer = Trainer(model, config, seed=1)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rollout, outcome, metrics = trainer.rollout(images, None)
    native = model(images).repeat_interleave(config.rollouts, 0)
    pruned = trainer.game.predict(rollout.final)
    torch.testing.assert_close(outcome.kl, fidelity_loss(native, pruned, temperature=3.0), atol=1e-5, rtol=1e-3)
    assert metrics["game/kl"] == pytest.approx(float(fidelity_loss(native, pruned).mean()), rel=1e-3)
    with torch.enable_grad():
        trainer.update(images, None)
    sizes = {len(group["params"]): group["lr"] for group in trainer.optimizer.param_groups}
    assert sizes == {1: 1e-2, len(list(trainer.critic.parameters())): 2e-3}


@pytest.mark.parametrize(("able", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_one_the_device_computes_in(able, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert training_dtype("auto", torch.device("cpu")) == chosen
    assert training_dtype("float32", torch.device("cpu")) == torch.float32
