"""Ablations: each changes what its name says, and the command measures all of them over several seeds."""

import csv
import json
import math

import pytest
import torch
from conftest import tiny_vit

from tokengame.cli.main import main
from tokengame.config import TrainConfig, with_overrides
from tokengame.game import Observation
from tokengame.learning.trainer import Trainer
from tokengame.measure.ablate import ABLATIONS, across_seeds, variants
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


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_learns(name):
    base = {"game": {"stages": (1, 2)}, "updates": 2, "rollouts": 2, "batch_size": 3, "dtype": "float32"}
    config = variants(with_overrides(TrainConfig.from_preset("tokengame"), base))[name]
    trainer = Trainer(tiny_vit(), config, seed=1)
    before = [p.clone() for p in trainer.actor.parameters()]
    metrics = trainer.update(torch.randn(config.batch_size, 3, 32, 32), None)
    assert metrics["losses/first_ratio_error"] < 1e-4
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.actor.parameters(), strict=True))


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
