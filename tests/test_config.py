"""Settings: every number is finite and in range, every choice is one that exists, and the sentence names the flag."""

import math
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from tokengame.config import (
    PRESETS,
    ActorConfig,
    AugmentConfig,
    FinetuneConfig,
    GameConfig,
    PPOConfig,
    RewardConfig,
    TrainConfig,
    check_settings,
)
from tokengame.errors import TokenGameError
from tokengame.ranges import Range, require_in, shown

CONFIGS = (GameConfig, ActorConfig, RewardConfig, PPOConfig, TrainConfig, AugmentConfig, FinetuneConfig)
FIELDS = [(config, f.name, f.type) for config in CONFIGS for f in fields(config)]
NUMBERS = [(config, name) for config, name, kind in FIELDS if "int" in kind or "float" in kind]
NEVER = [math.nan, math.inf, -math.inf, 1e30, -1e30, 10**400, True, "1", torch.tensor(0.5), [0.5], {}]
"""what no number of any config may be; `10 ** 400` is more than a float holds"""


@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_no_number_is_taken_unseen(config, name):
    for value in NEVER:
        tried = (value,) if name in ("stages", "hidden") else value
        if name == "stages" and type(value) is int:
            continue  # compared with the model's depth later
        with pytest.raises(TokenGameError) as caught:
            config(**{name: tried})
        sentence = str(caught.value)
        assert name.replace("_", "-") in sentence
        assert "\n" not in sentence
        assert len(sentence) < 200


def test_there_are_numbers_to_try():
    assert len(NUMBERS) > 30
    assert not [f for config in CONFIGS for f in fields(config) if f.type in ("int", "float")], "without a range"


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (PPOConfig, {"lr": 1e30}, "--ppo.lr must be a number above 0 and at most 1, not 1e+30"),
        (PPOConfig, {"clip": -1}, "--ppo.clip must be a number above 0 and at most 1,000,000, not -1"),
        (PPOConfig, {"gamma": 1.01}, "--ppo.gamma must be a number from 0 to 1"),
        (PPOConfig, {"gae_lambda": -0.1}, "--ppo.gae-lambda must be"),
        (PPOConfig, {"critic": "both"}, "--ppo.critic must be 'central' or 'local', not 'both'"),
        (RewardConfig, {"target_drop": math.nan}, "--target-drop must be a number above 0 and at most 100, not nan"),
        (RewardConfig, {"kind": "fidelity", "target_kl": 0}, "--target-kl must be a number above 0"),
        (RewardConfig, {"target_drop": 1.0}, "--target-drop steers --reward.kind fidelity, not share"),
        (RewardConfig, {"alpha": math.inf}, "--reward.alpha must be"),
        (GameConfig, {"stage_count": 0}, "--game.stage-count must be a whole number from 1 to 1,000, not 0"),
        (GameConfig, {"transition": "mErge"}, "--game.transition must be 'drop' or 'merge', not 'mErge'"),
        (GameConfig, {"cascade_margin": 1e9}, "--game.cascade-margin must be a number from 0 to 100"),
        (GameConfig, {"stages": (2.0, 3)}, "each of --game.stages must be a whole number, not 2.0"),
        (GameConfig, {"stages": 3}, "--game.stages must be a list of numbers, not 3"),
        (ActorConfig, {"hidden": ()}, "--actor.hidden must be 1 to 8 widths, not 0"),
        (ActorConfig, {"hidden": (100_000,)}, "each of --actor.hidden must be a whole number from 1 to 4,096"),
        (ActorConfig, {"hidden": (4096,) * 4}, "--actor.hidden makes 50,331,648 weights; at most 16,777,216"),
        (ActorConfig, {"keep": 1.0, "observation": "context"}, "--actor.keep must be a number above 0 and below 1"),
        (ActorConfig, {"keep": 0.5}, "--actor.keep is for observation context"),
        (TrainConfig, {"batch_size": 10**9}, "--batch-size must be a whole number from 1 to 65,536, not 1000000000"),
        (TrainConfig, {"batch_size": 0}, "--batch-size must be"),
        (TrainConfig, {"updates": 2.0}, "--updates must be a whole number"),
        (TrainConfig, {"dtype": "float8"}, "--dtype must be 'auto' or 'float32' or 'bfloat16'"),
        (TrainConfig, {"ppo": {"lr": 1}}, "--ppo must be a PPOConfig"),
        (FinetuneConfig, {"crop": 0.0}, "--crop must be a number above 0 and at most 1, not 0.0"),
        (FinetuneConfig, {"ema": 1.0}, "--ema must be a number of at least 0 and below 1, not 1.0"),
        (FinetuneConfig, {"opt": None}, "--opt must be text, not None"),
        (FinetuneConfig, {"augment": AugmentConfig(mixup=0.8)}, "--augment.mixup, cutmix and smoothing change labels"),
        (AugmentConfig, {"mixup": -1}, "--augment.mixup must be a number from 0 to 100, not -1"),
        (PPOConfig, {"critic_id": 1}, "--ppo.critic-id must be True or False, not 1"),
        (PPOConfig, {"sched": "cosine"}, "--ppo.sched must be 'linear' or 'constant', not 'cosine'"),
        (FinetuneConfig, {"distill": 0.0}, "give --distill or --labels a weight above 0"),
    ],
)
def test_a_setting_out_of_range_is_named_by_its_flag(config, changes, sentence):
    with pytest.raises(TokenGameError) as caught:
        config(**changes)
    assert str(caught.value).startswith(sentence)


def test_every_default_and_preset_is_allowed():
    for name in PRESETS:
        config = TrainConfig.from_preset(name)
        for part in (config, *(value for value in vars(config).values() if is_dataclass(value))):
            check_settings(part)
    for config in CONFIGS:
        config()


def test_ranges_by_hand():
    share, above, count = Range(0, 1), Range(0, 1, above=True, below=True), Range(1, 9, whole=True)
    assert [value in share for value in (0, 1, 0.5, -1e-9, 1.1)] == [True, True, True, False, False]
    assert [value in above for value in (0, 1, 0.5, 1e-300)] == [False, False, True, True]
    assert [value in count for value in (1, 9, 10, 2.0, True)] == [True, True, False, False, False]
    assert np.float64(0.5) in share
    assert math.inf not in Range()
    assert [str(r) for r in (share, above, count)] == [
        "a number from 0 to 1", "a number above 0 and below 1", "a whole number from 1 to 9"
    ]  # fmt: skip
    with pytest.raises(TokenGameError, match="--workers must be a whole number from 1 to 9, not 0"):
        require_in(count, 0, "--workers")


def test_whatever_is_shown_is_short_and_on_one_line():
    for value in (10**5000, "a\nb" * 1000, torch.zeros(9, 9), [[[[[[[[]]]]]]]], {"a": list(range(1000))}):
        assert len(shown(value)) < 120
        assert "\n" not in shown(value)
