"""A training run on disk: same seed same policy, resumable, nothing half-written, and it learns."""

import copy
import io
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import policy_for
from PIL import Image

from tokengame.config import PRESETS, FinetuneConfig, TrainConfig, with_overrides
from tokengame.data.datasets import FolderImages
from tokengame.errors import Interrupted, TokenGameError
from tokengame.files import require_writable
from tokengame.learning.finetune import Tuner
from tokengame.learning.loop import memory_taken
from tokengame.learning.rollout import initialise_biases, sample_games
from tokengame.learning.run import TrainingRun
from tokengame.learning.trainer import Trainer, training_dtype
from tokengame.measure.fidelity import fidelity_loss
from tokengame.report.figures import CURVES, curves_figure

SMALL = {"updates": 4, "batch_size": 4, "dtype": "float32", "game": {"stages": (1, 2)}}


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    images = FolderImages(tmp_path, [f"{i}.png" for i in range(8)])
    images.labels = [i % 5 for i in range(8)]
    return images


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
    for name, reward in {"cost": {"alpha": 0.0, "beta": 1.0}, "gain": {"alpha": 100.0, "beta": 0.0}}.items():
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
    torch.testing.assert_close(outcome.loss, fidelity_loss(native, pruned, temperature=3.0), atol=1e-5, rtol=1e-3)
    assert metrics["game/kl"] == pytest.approx(float(fidelity_loss(native, pruned).mean()), rel=1e-3)
    with torch.enable_grad():
        trainer.update(images, None)
    sizes = {len(group["params"]): group["lr"] for group in trainer.optimizer.param_groups}
    assert sizes == {1: 1e-2, len(list(trainer.critic.parameters())): 2e-3}


def trained(model, preset, updates=3, **changes):
    """A trainer after some updates on labelled images, and the metrics of each."""
    base = {"game": {"stages": (1, 2)}, "dtype": "float32", "updates": updates}
    config = with_overrides(with_overrides(TrainConfig.from_preset(preset), base), changes)
    trainer, generator = Trainer(model, config, seed=1), torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = model(images).argmax(1)
    return trainer, [trainer.update(images, labels) for _ in range(updates)]


@pytest.mark.parametrize(("sched", "left"), [("linear", (1, 2 / 3, 1 / 3)), ("constant", (1, 1, 1))])
def test_the_step_size_falls_or_stays(model, sched, left):
    _, metrics = trained(model, "rl4evit", ppo={"sched": sched, "lr": 1e-3})
    assert [m["charts/learning_rate"] for m in metrics] == pytest.approx([1e-3 * part for part in left])


def test_the_preset_of_their_code_is_what_the_code_runs(model):
    """The figures are from the table of docs/paper.md, not from the preset."""
    trainer, metrics = trained(model, "rl4evit-code")
    (group, other), config = trainer.optimizer.param_groups, trainer.config
    assert (group["lr"], group["eps"], other["lr"], other["eps"]) == (5e-6, 1e-8, 5e-6, 1e-8)
    assert (config.batch_size, config.ppo.minibatches, config.ppo.epochs) == (64, 4, 4)
    assert (config.ppo.clip, config.ppo.gamma, config.ppo.entropy, config.ppo.max_grad_norm) == (0.2, 0.99, 0.01, 10)
    assert (config.reward.kind, config.reward.alpha, config.reward.keep_target) == ("target", 24, 0.7)
    assert (config.game.transition, config.actor.observation, config.rollouts) == ("drop", "token_id", 1)
    assert TrainConfig.from_preset("rl4evit-code").game.blocks(12) == (3, 6, 9)
    assert trainer.critic.identity.shape == (16, 64)
    assert metrics[0]["losses/first_ratio_error"] < 1e-4


def test_advantages_are_as_they_are_where_they_are_not_normalised(model):
    trainer, _ = trained(model, "rl4evit-code")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    rollout, outcome, _ = trainer.rollout(images, model(images).argmax(1))
    experience, rewards = trainer.experience(rollout, outcome), trainer.rewards(outcome)
    values = torch.zeros_like(rewards)
    for t, obs in enumerate(rollout.observations):
        values[t].view(-1)[rollout.rows[t]] = trainer.critic(obs).detach()
    following = torch.cat([values[1:], torch.zeros_like(values[:1])]).masked_fill(outcome.ends, 0.0)
    expected = (rewards + 0.99 * following - values)[outcome.acting]
    torch.testing.assert_close(experience.advantage, expected, atol=1e-5, rtol=1e-5)


def test_learning_curves_are_of_what_was_measured():
    """A run of 250 updates of 64 games, of which every tenth was compared: means of neighbours over games."""
    lines = [
        {"update": n + 1, "game/kept_0": 0.9, "game/kept_1": 0.5, "game/gmacs_ratio": 0.7, "game/top1": 0.8}
        | ({"game/kl": 0.1} if n % 10 == 0 else {})
        for n in range(250)
    ]
    assert [reading(lines[0]) for reading in CURVES.values()] == [0.5, 0.7, 0.8, 0.1]
    picture = Image.open(io.BytesIO(curves_figure({"one": (64, lines), "none yet": (64, [])})))
    assert picture.format == "PNG"
    assert picture.size == (900, 600)


def test_native_predictions_that_no_reward_needs_change_nothing_that_is_learned(model):
    """With a native forward in every second of three updates, KL is missing from the second and no weight differs."""
    every, second = (trained(model, "rl4evit", reward={"native_every": number}) for number in (1, 2))
    assert ["game/kl" in m for m in second[1]] == [True, False, True]
    assert ["time/throughput_vs_native" in m for m in second[1]] == [True, False, True]
    assert all("game/top1" in m for m in second[1])
    for one, other in zip(every[0].actor.parameters(), second[0].actor.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(TokenGameError, match=r"^--reward.native-every leaves native predictions out"):
        trained(model, "tokengame", reward={"native_every": 2})


@pytest.mark.parametrize(("able", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_one_the_device_computes_in(able, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert training_dtype("auto", torch.device("cpu")) == chosen
    assert training_dtype("float32", torch.device("cpu")) == torch.float32


def test_an_earlier_run_is_not_replaced_unless_that_is_wanted(model, source, tmp_path):
    run_for(model, source, tmp_path).run()
    log = tmp_path / "policy_log"
    before = (log / "metrics.jsonl").read_bytes()
    with pytest.raises(TokenGameError, match=r"checkpoint.pt is of an earlier run.*--resume.*--overwrite"):
        run_for(model, source, tmp_path)
    (log / "checkpoint.pt").unlink()
    with pytest.raises(TokenGameError, match=r"metrics.jsonl is of an earlier run"):
        run_for(model, source, tmp_path)
    assert (log / "metrics.jsonl").read_bytes() == before
    run_for(model, source, tmp_path, overwrite=True, updates=1).run()
    assert len((log / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("resume", [False, None])
def test_a_policy_without_its_log_is_not_replaced(resume, model, source, tmp_path):
    (tmp_path / "policy.safetensors").write_bytes(b"mine")
    with pytest.raises(TokenGameError, match=r"policy.safetensors is (of an earlier run|there but not the log)"):
        run_for(model, source, tmp_path, resume=resume)
    assert (tmp_path / "policy.safetensors").read_bytes() == b"mine"


def test_a_run_that_continues_by_itself_refuses_one_of_other_settings(model, source, tmp_path):
    run_for(model, source, tmp_path).run()
    with pytest.raises(TokenGameError, match="of other settings"):
        run_for(model, source, tmp_path, resume=None, rollouts=3)
    assert run_for(model, source, tmp_path, resume=None).trainer.updates == 4


@pytest.mark.usefixtures("two_threads")
def test_a_finished_run_goes_on_as_if_it_had_not_been_calibrated(model, source, tmp_path):
    """Calibration at the end moves biases; learning goes on from those before, at the step sizes of the longer run."""
    finished, cut = (run_for(model, source, tmp_path / name) for name in ("finished", "cut"))
    finished.run()
    cut.loop.run()  # all updates, but no calibration
    assert not torch.equal(weights_of(finished), weights_of(cut))
    longer = []
    for name in ("finished", "cut"):
        with pytest.warns(UserWarning, match="the run of 4 updates goes on after 4 as one of 6"):
            run = run_for(model, source, tmp_path / name, resume=True, updates=6)
        run.run()
        assert run.trainer.calibrated
        longer.append(run)
    assert torch.equal(*map(weights_of, longer))
    lines = [(run.log.path / "metrics.jsonl").read_text().splitlines() for run in longer]
    assert lines[0] == lines[1]
    sizes = [json.loads(line)["charts/learning_rate"] for line in lines[0]]
    assert sizes == pytest.approx([1e-2 * left for left in (1, 3 / 4, 2 / 4, 1 / 4, 2 / 6, 1 / 6)])


def test_fewer_updates_than_were_done_are_refused(model, source, tmp_path):
    run_for(model, source, tmp_path).run()
    with pytest.raises(TokenGameError, match="has done 4 updates already; --updates must be at least that, not 3"):
        run_for(model, source, tmp_path, resume=True, updates=3)


def test_config_json_tells_what_was_run_and_metrics_do_not_depend_on_it(model, source, tmp_path):
    run_for(model, source, tmp_path / "a").run()
    config = with_overrides(TrainConfig.from_preset("tokengame"), SMALL)
    about = {"images": "somewhere", "weights": None}
    other = TrainingRun(model, "other", config, source, tmp_path / "b" / "policy", seed=3, workers=0, about=about)
    other.run()
    found = json.loads((tmp_path / "b" / "policy_log" / "config.json").read_text())
    assert {"backbone": "other", "images": "somewhere", "weights": None, "seed": 3}.items() <= found.items()
    assert {"tokengame", "torch", "timm", "command", "commit", "folder"} <= found.keys()
    assert found["settings"]["game"]["stages"] == [1, 2]
    metrics = [(tmp_path / run / "policy_log" / "metrics.jsonl").read_bytes() for run in "ab"]
    assert metrics[0] == metrics[1]


def interrupted(run, *numbers):
    """The exception of a run that gets these signals in its second update."""
    steer = run.trainer.controller.update

    def interrupt(kl):
        if run.trainer.updates == 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        steer(kl)

    run.trainer.controller.update = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        run.run()
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_what_is_saved_and_how_to_go_on(number, model, source, tmp_path):
    error = interrupted(run_for(model, source, tmp_path / "run"), number)
    assert isinstance(error, Interrupted)
    assert error.number == number
    assert str(error) == "stopped after update 2 of 4, which is saved: run it again with --resume to go on"
    assert run_for(model, source, tmp_path / "run", resume=True).trainer.updates == 2
    error = interrupted(run_for(model, source, tmp_path / "by itself", resume=None), number)
    assert str(error).endswith("run the same command again to go on")


def test_a_second_signal_claims_nothing(model, source, tmp_path):
    error = interrupted(run_for(model, source, tmp_path), signal.SIGINT, signal.SIGINT)
    assert type(error) is KeyboardInterrupt
    assert not str(error)
    with pytest.raises(TokenGameError, match="nothing to resume"):
        run_for(model, source, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, -1, 2, 3], "label -1 is no class of the model, whose classes are 0 to 4"),
        ([0, 1, 5, 3], "label 5 is no class"),
        ([0.0, 1.0, 2.0, 3.0], "must be integers, not torch.float32"),
        ([True, False, True, True], "must be integers, not torch.bool"),
        ([0, 1, 2], r"for each of 4 images, not \[3\]"),
        ([[0], [1], [2], [3]], r"not \[4, 1\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, says, model):
    config = with_overrides(TrainConfig.from_preset("tokengame"), {"game": {"stages": (1, 2)}, "dtype": "float32"})
    images = torch.randn(4, 3, 32, 32)
    tuner = Tuner(model, policy_for(model), 0.5, FinetuneConfig(labels=1.0, dtype="float32"))
    for learner in (Trainer(model, config), tuner):
        with pytest.raises(TokenGameError, match=says):
            learner.update(images, torch.tensor(labels))
        assert learner.updates == 0


def states(model):
    """Learners and states that do not fit them."""
    trainer = Trainer(model, with_overrides(TrainConfig.from_preset("tokengame"), SMALL))
    tuner = Tuner(model, policy_for(model), 0.5, FinetuneConfig(dtype="float32"))
    for learner in (trainer, tuner):
        learner.update(torch.randn(4, 3, 32, 32), None)
        good = learner.state_dict()
        yield learner, {}
        yield learner, []
        for name, value in good.items():
            yield learner, {key: item for key, item in good.items() if key != name}
            if isinstance(value, dict) and name != "optimizer":
                yield learner, good | {name: {key: torch.zeros(3, 7) for key in value}}
            yield learner, good | {name: "nonsense"}
        wrong = copy.deepcopy(good)
        wrong["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 3)
        yield learner, wrong


def test_a_state_that_does_not_fit_is_one_sentence(model):
    for learner, state in states(model):
        with pytest.raises(TokenGameError, match=r"^the saved state does not fit this (policy|model): [^\n]+$"):
            learner.load_state_dict(copy.deepcopy(state))


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert math.isnan(memory_taken())


def test_the_progress_says_what_the_updates_measure(model, source, tmp_path):
    said = []

    def watch(iterable, description, _total):
        for item in iterable:
            yield item
            said.append(description() if callable(description) else description)

    run = run_for(model, source, tmp_path)
    run.run(watch)
    lines = [json.loads(line) for line in (run.log.path / "metrics.jsonl").read_text().splitlines()]
    for line, text in zip(lines, said, strict=False):
        assert text.startswith(f"training  KL {line['game/kl']:.3f}  compute {line['game/gmacs_ratio']:.2f}  ")
        assert text.endswith(" images/s")
