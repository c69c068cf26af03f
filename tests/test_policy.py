"""The policy file and the faster model around it."""

import copy
import json
import math

import pytest
import torch
from conftest import policy_for, tiny_vit
from safetensors.torch import load_file, save_file

import tokengame
from tokengame.backbones import preprocessing_of, wrap
from tokengame.config import TrainConfig, with_overrides
from tokengame.errors import TokenGameError
from tokengame.learning.run import TrainingRun
from tokengame.learning.trainer import Trainer
from tokengame.policies import Policy
from tokengame.policies.policy import FORMAT, SHIPPED, fingerprint, threshold
from tokengame.runtime import PrunedViT


def make_policy(model, tmp_path, preset="tokengame", **changes):
    config = with_overrides(
        with_overrides(TrainConfig.from_preset(preset), {"game": {"stages": (1, 2)}, "dtype": "float32"}), changes
    )
    run = object.__new__(TrainingRun)
    run.config, run.name, run.seed = config, "tiny", 0
    run.trainer, run.preprocessing = Trainer(model, config), preprocessing_of(model)
    path = tmp_path / "policy.safetensors"
    run.policy([]).save(path)
    return path


@pytest.fixture
def path(model, tmp_path):
    return make_policy(model, tmp_path)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("preset", ["tokengame", "rl4evit"])
@torch.no_grad()
def test_file_gives_back_the_same_decisions(preset, model, tmp_path, images):
    path = make_policy(model, tmp_path, preset)
    loaded = Policy.load(path)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    first, second = tokengame.prune(model, path), tokengame.prune(model, again)
    assert torch.equal(first(images), second(images))
    assert loaded.card["backbone"]["shape"]["dim"] == 32
    assert path.stat().st_size < 600_000


@torch.no_grad()
def test_dial_zero_is_native_and_more_prunes_more(model, path, images):
    fast, native = tokengame.prune(model, path), model(images)
    kept = []
    for dial in (0, 0.3, 0.6, 0.9, 1):
        fast.dial = dial
        kept.append(float(fast.predict(images).kept[-1].float().mean()))
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (16, 1)
    fast.dial = 0
    torch.testing.assert_close(fast(images), native, atol=1e-5, rtol=1e-5)
    assert fast.restore() is model
    assert torch.equal(model(images), native)


@torch.no_grad()
def test_trace_says_which_tokens_are_kept(model, path, images):
    fast = tokengame.prune(model, path, dial=0.8)
    trace, state = fast.trace(images), fast.game.play(images, fast.actor, threshold(0.8))
    assert torch.equal(trace.sum(2), torch.stack(state.kept))
    assert torch.equal(trace[-1].nonzero()[:, 1], state.position[state.agent_rows])
    assert torch.equal(trace[-1], fast.predict(images).alive)
    assert not (trace[1] & ~trace[0]).any()


def test_threshold_is_the_dial_as_a_keep_probability():
    assert [threshold(d) for d in (0, 0.5, 1)] == [-math.inf, 0, math.inf]
    assert 1 / (1 + math.exp(-threshold(0.3))) == pytest.approx(0.3)
    for wrong in (-0.1, 1.1):
        with pytest.raises(TokenGameError, match="between 0"):
            threshold(wrong)


def test_the_fingerprint_depends_on_weights_and_not_on_number_formats(model):
    before = fingerprint(wrap(model))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert fingerprint(wrap(copy.deepcopy(model).to(dtype))) == before
    assert fingerprint(wrap(tiny_vit(seed=1))) != before


def test_other_weights_warn_other_shape_is_refused(path):
    with pytest.warns(UserWarning, match="other weights"):
        tokengame.prune(tiny_vit(seed=1), path)
    with pytest.raises(TokenGameError, match="its depth 4 but the model's is 3"):
        tokengame.prune(tiny_vit(depth=3), path)
    with pytest.raises(TokenGameError, match="dim 32 but the model's is 64"):
        tokengame.prune(tiny_vit(embed_dim=64), path)


@torch.no_grad()
def test_context_policy_holds_at_any_resolution_and_an_identity_policy_does_not(tmp_path):
    small, large = tiny_vit(), tiny_vit(img_size=48)
    path = make_policy(small, tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        fast = tokengame.prune(large, path)
    assert fast(torch.randn(2, 3, 48, 48)).shape == (2, 5)
    path = make_policy(small, tmp_path, "rl4evit")
    with pytest.raises(TokenGameError, match="input_size"):
        tokengame.prune(large, path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "foreign", "future", "nan", "contradiction"])
def test_a_bad_file_gets_one_clear_sentence(damage, path, tmp_path):
    weights, card = load_file(path), Policy.load(path).card
    reasons = {"missing": "no policy file", "foreign": "no tokengame policy", "future": "format 99",
               "nan": "not finite", "contradiction": "contradicts"}  # fmt: skip
    if damage == "missing":
        path = tmp_path / "nowhere.safetensors"
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "text":
        path.write_text("not a policy")
    elif damage == "foreign":
        save_file(weights, path)
    else:
        if damage == "future":
            card["format"] = 99
        elif damage == "nan":
            weights["weight"] = weights["weight"] * float("nan")
        else:
            del weights["weight"]
        save_file(weights, path, metadata={"tokengame": json.dumps(card)})
    with pytest.raises(TokenGameError, match=reasons.get(damage, "damaged")) as caught:
        Policy.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_format_4_is_read_under_todays_names(model, path, tmp_path, images):
    """Its card calls the margin of the cascade second_look, and its weights are called line."""
    policy = Policy.load(path)
    policy.card["game"] |= {"cascade_margin": 0.2}
    old_game = {"second_look" if name == "cascade_margin" else name: v for name, v in policy.card["game"].items()}
    old = tmp_path / "old.safetensors"
    card = policy.card | {"format": 4, "game": old_game}
    save_file({"line": load_file(path)["weight"]}, old, metadata={"tokengame": json.dumps(card)})
    found = Policy.load(old)
    assert found.game.cascade_margin == 0.2
    assert torch.equal(found.actor.weight, policy.actor.weight)
    assert found.card == policy.card
    assert torch.equal(tokengame.prune(model, old)(images), tokengame.prune(model, policy)(images))
    found.save(old)
    assert set(load_file(old)) == {"weight"}, "what is saved again has today's format"
    assert Policy.load(old).card["format"] == FORMAT == 5


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_policies_can_be_read(path):
    policy = Policy.load(path)
    assert path.stem.startswith(policy.card["backbone"]["name"])
    assert len(policy.card["calibration"]) > 10


def test_an_unknown_shipped_name_lists_what_there_is(model):
    with pytest.raises(TokenGameError, match="none of that name is shipped"):
        tokengame.prune(model, "vit_gigantic")


@torch.no_grad()
def test_a_target_instead_of_a_dial(model, path, images):
    """Compute requested between two calibrated dials is what the model then takes."""
    policy = Policy.load(path)
    with torch.no_grad():
        policy.actor.weight[:, -1] -= 2.0  # so that the dials reach from all to few
    rows = []
    for dial in (0.2, 0.4, 0.5, 0.6, 0.8):
        fast = tokengame.prune(model, policy, dial)
        native, macs = fast.macs(fast.predict(images))
        ratio = float(macs.mean()) / native
        rows.append({"dial": dial, "gmacs_ratio": ratio, "gmacs": float(macs.mean()) / 1e9, "drop_pp_bound95": None})
    assert rows[0]["gmacs_ratio"] > rows[-1]["gmacs_ratio"], "dials do something"
    policy.card["calibration"] = rows
    wanted = rows[2]["gmacs_ratio"]
    for changes in ({"gmacs_ratio": wanted}, {"gmacs": rows[2]["gmacs"]}):
        fast = tokengame.prune(model, policy, **changes)
        native, macs = fast.macs(fast.predict(images))
        assert float(macs.mean()) / native == pytest.approx(wanted, abs=0.02)
    with pytest.raises(TokenGameError, match="not both"):
        tokengame.prune(model, policy, 0.5, gmacs_ratio=wanted)
    with pytest.raises(TokenGameError, match="without labels"):
        tokengame.prune(model, policy, max_drop=1.0)


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_attended_tokens_are_kept_and_those_with_a_good_absorber_may_be_pruned(transition, model, images):
    """What a policy does before it has learned, by the definition of `START`; alone, absorbers count for nothing."""
    policy = policy_for(model, transition)
    game = PrunedViT(model, policy, dial=0.5).game
    obs = game.observe(game.reset(images))
    logits = policy.actor(obs)
    attention, _, _, _, leader, dither = obs.features[:, -6:].unbind(1)
    start = {"drop": 1.5 * attention + 0.5 * dither, "merge": 1.5 * attention - 6 * (leader - 0.6) + 0.25 * dither}
    torch.testing.assert_close(logits, start[transition])
    assert leader.count_nonzero() == (0 if transition == "drop" else len(leader))
