"""Ablations: each changes what its name says, and the command measures all of them over several seeds."""

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import tiny_vit

from tokengame.cli.main import main
from tokengame.config import TrainConfig, with_overrides
from tokengame.game import Observation
from tokengame.learning.trainer import Trainer
from tokengame.measure.ablate import ABLATIONS, WALK, across_seeds, variants, walk
from tokengame.measure.evaluate import at_ratios
from tokengame.policies.networks import Critic


def test_figures_at_a_ratio_by_hand():
    rows = [
        {"gmacs_ratio": 0.9, "agreement": 1.0, "kl": 0.001},
        {"gmacs_ratio": 0.7, "agreement": 0.9, "kl": 0.1},
    ]
    found = at_ratios(rows)
    assert found["agreement_0.8"] == pytest.approx(0.95)
    assert found["kl_0.8"] == pytest.approx(0.01, rel=1e-3), "the logarithm is interpolated"
    assert found["agreement_0.7"] == pytest.approx(0.9)
    assert math.isnan(found["kl_0.6"])


def test_mean_and_spread_over_seeds_by_hand():
    three = [{"a": 1.0}, {"a": 2.0}, {"a": 6.0}, {"a": math.nan}]
    assert across_seeds(three) == {"a": 3.0, "a_std": pytest.approx(7**0.5), "a_seeds": 3}
    assert across_seeds([{"a": 1.0}]) == {"a": 1.0, "a_std": 0.0, "a_seeds": 1}
    assert math.isnan(across_seeds([{"a": math.nan}])["a"])


def test_variants_play_the_same_number_of_games():
    config = TrainConfig.from_preset("tokengame")
    found = variants(config)
    assert set(found) == set(ABLATIONS)
    assert {v.batch_size * v.rollouts for v in found.values()} == {config.batch_size * config.rollouts}
    assert len({json.dumps(v, default=vars) for v in found.values()}) == len(found), "no two are the same"


@torch.no_grad()
def test_a_local_critic_does_not_see_the_class_token():
    obs = [
        Observation(torch.ones(2, 8), torch.full((1, 8), value), torch.ones(2, 7), torch.zeros(2, dtype=torch.long),
                    torch.arange(2), torch.zeros(1, dtype=torch.long))
        for value in (0.0, 5.0)
    ]  # fmt: skip
    central, local = (Critic(8, 2, 1, (4,), features=False, central=c) for c in (True, False))
    assert torch.equal(local(obs[0]), local(obs[1]))
    assert not torch.equal(central(obs[0]), central(obs[1]))


@torch.no_grad()
def test_a_critic_may_see_the_id():
    """Two agents with the same token have the same value unless the critic sees who they are."""
    obs = Observation(torch.ones(2, 8), torch.ones(1, 8), torch.ones(2, 7), torch.zeros(2, dtype=torch.long),
                      torch.arange(2), torch.zeros(1, dtype=torch.long))  # fmt: skip
    without, seeing = (Critic(8, 2, 1, (4,), features=False, agents=agents)(obs) for agents in (None, 16))
    assert without[0] == without[1]
    assert seeing[0] != seeing[1]


def test_the_ids_part_of_the_critic_is_a_linear_layer_on_a_one_hot_vector():
    torch.manual_seed(0)
    critic = Critic(8, 2, 1, (4,), features=False, agents=5)
    x, cls, agent = torch.randn(3, 8), torch.randn(1, 8), torch.tensor([4, 0, 4])
    obs = Observation(x, cls, torch.ones(3, 7), torch.zeros(3, dtype=torch.long), agent, torch.zeros(1).long())
    joint = torch.cat([critic.token.weight, critic.cls.weight, critic.identity.T], 1)
    whole = torch.cat([x, cls.expand(3, -1), torch.eye(5)[agent]], 1) @ joint.T
    torch.testing.assert_close(critic(obs), critic.rest(torch.tanh(whole)).squeeze(1))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_learns(name):
    base = {"game": {"stages": (1, 2)}, "updates": 2, "rollouts": 2, "batch_size": 3, "dtype": "float32"}
    config = variants(with_overrides(TrainConfig.from_preset("tokengame"), base))[name]
    trainer = Trainer(tiny_vit(), config, seed=1)
    before = [p.clone() for p in trainer.actor.parameters()]
    metrics = trainer.update(torch.randn(config.batch_size, 3, 32, 32), None)
    assert metrics["losses/first_ratio_error"] < 1e-4
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.actor.parameters(), strict=True))


def test_the_walk_ends_at_the_default_preset_and_all_rows_play_as_many_games():
    start = with_overrides(TrainConfig.from_preset("rl4evit-code"), {"updates": 100})
    rows = walk(start)
    first, *_, last = rows.values()
    assert first == start
    assert replace(last, preset="tokengame", updates=400) == TrainConfig.from_preset("tokengame")
    assert {config.updates * config.batch_size * config.rollouts for config in rows.values()} == {6400}
    assert all(one != other for one, other in pairwise(rows.values()))


@pytest.mark.parametrize("name", WALK)
def test_every_row_of_the_walk_learns(name):
    start = {"game": {"stages": (1, 2)}, "updates": 2, "batch_size": 4, "dtype": "float32"}
    config = walk(with_overrides(TrainConfig.from_preset("rl4evit-code"), start))[name]
    trainer = Trainer(tiny_vit(), config, seed=1)
    before = [p.clone() for p in trainer.actor.parameters()]
    images = torch.randn(config.batch_size, 3, 32, 32)
    trainer.update(images, torch.arange(config.batch_size) % 5)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.actor.parameters(), strict=True))


def test_a_walk_starts_where_it_says(capsys):
    assert main(["ablate", "--backbone", "fashion", "--images", "fashion", "--rows", "walk"]) == 2
    assert "--rows walk starts from --preset rl4evit-code, not tokengame" in " ".join(capsys.readouterr().err.split())


def test_the_command_measures_all_and_trains_nothing_twice(tmp_path, capsys):
    few = ["--holdout", "0.004", "--updates", "1", "--batch-size", "2", "--rollouts", "2", "--game.stages", "4"]
    arguments = ["ablate", "--backbone", "fashion", "--images", "fashion", *few, "--seeds", "1", "--workers", "0",
                 "--output", str(tmp_path), "--json"]  # fmt: skip
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["ablation"] for row in rows]
    assert {"processor", "kernels", "threads", "commit", "command"} <= set(rows[0])
    assert set(names) == {
        *ABLATIONS,
        "attention at its budgets",
        "random at its budgets",
        "nothing learned: the starting rule",
    }
    assert [row["ablation"] for row in csv.DictReader((tmp_path / "ablations.csv").read_text().splitlines())] == names
    timings = {path: path.read_text() for path in tmp_path.glob("*_log/timings.jsonl")}
    assert len(timings) == len(ABLATIONS)
    assert main(arguments) == 0
    assert {path: path.read_text() for path in timings} == timings, "no update took place again"
