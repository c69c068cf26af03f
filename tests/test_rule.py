"""Pruning without a policy: budgets as they are wanted for every image, thresholds that meet the compute on others."""

import copy
import io
import itertools
import json

import pytest
import torch
from conftest import tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import tokengame
from tokengame.backbones import wrap
from tokengame.cli.main import main
from tokengame.config import ActorConfig, TrainConfig
from tokengame.errors import TokenGameError
from tokengame.game import Observation
from tokengame.packed.attention import deterministic_attention
from tokengame.packed.layout import RaggedLayout
from tokengame.policies import Policy
from tokengame.policies.networks import START, BudgetActor, ContextActor, decision_of
from tokengame.runtime.macs import native_macs, pruned_macs
from tokengame.runtime.rule import Rule, nearest

CPU = torch.device("cpu")
KINDS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "embedding": {"num_classes": 0},
}


def finer_vit(seed=0, **changes):
    """With 64 tokens, so that a step of the budget is small."""
    return tiny_vit(seed, img_size=64, **changes)


def prune(*arguments, **settings):
    """Attention is not chosen by its speed, which takes time at every new shape."""
    fast = tokengame.prune(*arguments, **settings, progress=False)
    fast.game.attention = deterministic_attention
    return fast


def pictures(number, seed=0, size=64):
    """Smooth random images, some flat and some not."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 3, 6, 6, generator=generator) * torch.rand(number, 1, 1, 1, generator=generator) * 2
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")


def shares_by_hand(total, shares):
    """Tokens left after each stage, rounded to even as IEEE does."""
    for share in shares:
        total = max(1, round(total * share))
        yield total


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_every_image_keeps_its_budget_in_any_batch(kind):
    model = finer_vit(**KINDS[kind])
    fast, images = prune(model, gmacs_ratio=0.75), pictures(6)
    shares = fast.card["actor"]["shares"]
    assert shares == pytest.approx((shares[1] ** 0.5, shares[1], shares[1]), abs=0.02)
    wanted = [[number] * 6 for number in shares_by_hand(64, shares)]
    whole = fast.predict(images)
    assert [kept.tolist() for kept in whole.kept] == wanted
    for number in range(6):
        alone = fast.predict(images[number : number + 1])
        assert [int(kept) for kept in alone.kept] == [row[0] for row in wanted]
        torch.testing.assert_close(alone.logits[0], whole.logits[number], atol=1e-4, rtol=1e-4)
    native, macs = fast.macs(whole)
    assert float(macs.mean()) / native == pytest.approx(0.75, abs=0.02)
    assert len(macs.unique()) == 1
    assert fast(images).shape == model(images).shape


def observed(features, stage, counts):
    layout = RaggedLayout(counts, CPU)
    images = torch.full((len(counts),), stage)
    agents = torch.arange(layout.rows)
    return Observation(features, torch.zeros(len(counts), 1), features, layout.image, agents, images, layout)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([(1.0, 0.5), (0.7, 0.3), (1e-6, 1.0)]),
    st.integers(0, 1),
    st.integers(0, 5),
)
@torch.no_grad()
def test_decisions_are_bitwise_those_of_the_image_alone_and_ties_keep_the_budget(counts, shares, stage, levels):
    """Features of few levels make many ties, at the budget's edge too."""
    actor = BudgetActor(2, 2, START["merge"], shares)
    generator = torch.Generator().manual_seed(sum(counts) + levels)
    features = torch.randn(sum(counts), 8, generator=generator)
    features = (features * levels).round() / 2 if levels < 5 else features
    logits = actor(observed(features, stage, counts))
    best = ContextActor.by_rows(actor, observed(features, stage, counts))
    for own, rows, count in zip(
        logits.split(counts), itertools.pairwise([0, *itertools.accumulate(counts)]), counts, strict=True
    ):
        assert torch.equal(own, actor(observed(features[slice(*rows)], stage, [count])))
        number = max(1, round(count * shares[stage]))
        assert int((own > 0).sum()) == number
        kept = best[slice(*rows)][own > 0].tolist()
        assert sorted(kept, reverse=True) == sorted(best[slice(*rows)].tolist(), reverse=True)[:number]


@given(arrays("int64", (40,), elements=st.integers(0, 50)), st.floats(0.0, 1.0))
def test_bisection_finds_the_nearest_step(steps, share):
    levels = sorted(float(step) for step in steps)
    cost = lambda k: levels[min(int(k * 40), 39)]  # noqa: E731
    wanted = levels[0] + share * (levels[-1] - levels[0])
    assert abs(cost(nearest(cost, wanted)) - wanted) == min(abs(level - wanted) for level in levels)


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.6])
def test_the_compute_is_that_of_the_counter(ratio):
    """Of ViT-Ti, whose budgets have steps of a third of a percent."""
    backbone = wrap(tiny_vit(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3))
    rule = Rule(backbone)
    policy = rule.with_budgets(rule.shares_for(gmacs_ratio=ratio))
    kept = torch.tensor([[n] for n in shares_by_hand(196, policy.card["actor"]["shares"])])
    macs = float(pruned_macs(rule.game, policy.actor, kept, 196)) / native_macs(backbone, 196)
    assert macs == pytest.approx(ratio, abs=0.003)
    assert rule.ratio_for(gmacs=ratio * native_macs(backbone, 196) / 1e9) == pytest.approx(ratio)
    assert rule.ratio(rule.shares_for()) == pytest.approx(0.7, abs=0.003), "without a target"


@torch.inference_mode()
def test_the_dial_shifts_the_budget():
    model, images = finer_vit(), pictures(5)
    fast, native, kept = prune(model), model(images), []
    for dial in (0, 0.3, 0.4, 0.5, 0.7, 0.9, 1):
        fast.dial = dial
        kept.append(float(torch.stack(fast.predict(images).kept).float().mean()))
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    assert (kept[0], kept[-1]) == (64, 1)
    fast.dial = 0
    torch.testing.assert_close(fast(images), native, atol=1e-5, rtol=1e-5)
    assert fast.restore() is model


@pytest.mark.parametrize("images", [None, pictures(40, seed=1)], ids=["budgets", "thresholds"])
@torch.inference_mode()
def test_saved_and_loaded_it_decides_the_same(images, tmp_path):
    model, others = finer_vit(), pictures(4, seed=2)
    fast = prune(model, gmacs_ratio=0.7, images=images)
    Policy(fast.actor, fast.card).save(tmp_path / "rule.safetensors")
    loaded = Policy.load(tmp_path / "rule.safetensors")
    assert torch.equal(prune(model, loaded).predict(others).alive, fast.predict(others).alive)
    assert torch.equal(prune(model, loaded)(others), fast(others))
    assert loaded.card["training"]["rule"] == "the starting rule, nothing was learned"
    assert type(loaded.actor) is (BudgetActor if images is None else ContextActor)
    assert decision_of(loaded.actor) is not None, "a game in one call may run it"


@torch.inference_mode()
def test_budgets_hold_for_other_weights_and_sizes_without_a_warning(tmp_path):
    fast = prune(finer_vit())
    Policy(fast.actor, fast.card).save(tmp_path / "rule.safetensors")
    other = prune(finer_vit(seed=1), tmp_path / "rule.safetensors")
    assert torch.equal(torch.stack(other.predict(pictures(2)).kept), torch.stack(fast.predict(pictures(2)).kept))
    larger = prune(tiny_vit(img_size=96), tmp_path / "rule.safetensors")
    wanted = list(shares_by_hand(144, fast.card["actor"]["shares"]))
    assert [kept.tolist() for kept in larger.predict(pictures(2, size=96)).kept] == [[n] * 2 for n in wanted]


@pytest.mark.parametrize("kind", ["class token", "no class token", "embedding"])
@torch.inference_mode()
def test_thresholds_meet_the_compute_on_other_images(kind):
    model = finer_vit(**KINDS[kind]).train()  # of a model that is being trained, nothing is drawn at random
    for ratio in (0.8, 0.65):
        fast = prune(model, gmacs_ratio=ratio, images=pictures(256, seed=3))
        native, macs = fast.macs(fast.predict(pictures(256, seed=4)))
        assert float(macs.mean()) / native == pytest.approx(ratio, abs=0.02)
        assert len(macs.unique()) > 10, "counts adapt to the image"
    assert model.training


@torch.inference_mode()
def test_thresholds_are_those_of_a_game_played_image_by_image():
    """Quantiles over all images, stage after stage, from the observations of single games."""
    rule, images, shares = Rule(wrap(finer_vit())), pictures(33, seed=5), (0.8, 0.7, 0.6)
    rule.shares_for = lambda **_: shares
    policy = rule.with_thresholds([images[:20], images[20:]], keep=0.5)
    start = ContextActor(2, 3, START["merge"])
    states, found = [rule.game.reset(image[None]) for image in images], []
    for share in shares:
        logits = [start(rule.game.observe(state)) for state in states]
        found.append(torch.cat(logits).quantile(1 - share))
        states = [rule.game.step(s, own > found[-1], own) for s, own in zip(states, logits, strict=True)]
    torch.testing.assert_close(-policy.actor.weight[:, -1], torch.stack(found), atol=1e-4, rtol=1e-4)
    assert torch.equal(policy.actor.weight[:, :-1], start.weight[:, :-1])


def test_the_share_of_tokens_left_is_a_target_too():
    images = pictures(64, seed=6)
    fast = prune(finer_vit(), keep=0.5)
    assert fast.predict(images).kept[-1].float().mean() == pytest.approx(32, abs=1)
    fast = prune(finer_vit(), keep=0.5, images=images)
    assert fast.predict(images).kept[-1].float().mean() == pytest.approx(32, abs=1.5)
    assert prune(finer_vit(), keep=0.0).predict(images).kept[-1].tolist() == [1] * 64


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_drop": 1.0}, "guarantees no drop: run `tokengame calibrate --policy rule`"),
        ({"gmacs_ratio": 0.01}, "--gmacs-ratio 0.01 is out of reach of the starting rule: with one token left after"),
        ({"gmacs_ratio": 0.7, "keep": 0.5}, "give one of --max-drop|give one of max_drop"),
        ({"gmacs_ratio": -1}, "--gmacs-ratio must be a number above 0"),
        ({"gmacs_ratio": 0.7, "dial": 0.4}, "a dial or a target for it, not both"),
        ({"images": torch.zeros(0, 3, 32, 32)}, "images= is empty"),
        ({"images": torch.zeros(64, 3, 48, 48)}, "images are 3 x 48 x 48, and the model takes 3 x 32 x 32"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(model, settings, sentence):
    with pytest.raises(TokenGameError, match=sentence) as caught:
        prune(model, **settings)
    assert "\n" not in str(caught.value)


def test_images_are_for_the_rule_alone(model):
    policy = Rule(wrap(model)).with_budgets((0.9, 0.9, 0.9))
    with pytest.raises(TokenGameError, match="images= is for the starting rule"):
        prune(model, policy, images=torch.zeros(64, 3, 32, 32))


def test_few_images_warn(model):
    with pytest.warns(UserWarning, match="set on 3 images"):
        prune(model, images=torch.randn(3, 3, 32, 32))


def test_the_rule_is_never_trained():
    with pytest.raises(TokenGameError, match=r"--actor.shares is of the starting rule"):
        TrainConfig(actor=ActorConfig("context", shares=(0.5,)))
    with pytest.raises(TokenGameError, match=r"--actor.shares is for observation context"):
        ActorConfig(shares=(0.5,))


def test_a_card_with_another_number_of_shares_is_refused(model, tmp_path):
    policy = Rule(wrap(model)).with_budgets((0.9, 0.9, 0.9))
    policy.card = copy.deepcopy(policy.card)
    policy.card["actor"]["shares"] = [0.9]
    policy.save(tmp_path / "rule.safetensors")
    with pytest.raises(TokenGameError, match=r"actor.shares must have 3 entries"):
        Policy.load(tmp_path / "rule.safetensors")


FLAGS = ["--backbone", "fashion", "--images", "fashion", "--holdout", "0.012", "--workers", "0", "--json"]


def told(capsys, *arguments):
    assert main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_takes_the_rule(capsys):
    found = told(capsys, "eval", *FLAGS, "--policy", "rule", "--gmacs-ratio", "0.6")
    assert found["gmacs_ratio"] == pytest.approx(0.6, abs=0.01)
    assert found["gmacs_ratio_std"] == 0
    assert main(["eval", *FLAGS, "--policy", "rule", "--max-drop", "1"]) == 2
    assert "guarantees no drop" in capsys.readouterr().err.replace("\n", " ")


def test_calibrate_writes_a_rule_that_was_not_measured_on_its_own_images(tmp_path, capsys):
    path = tmp_path / "rule.safetensors"
    rows = told(capsys, "calibrate", *FLAGS, "--policy", "rule", "--output", str(path))
    card = Policy.load(path).card
    assert card["calibration"] == rows
    assert card["training"]["images"] == 256, "of those not held back"
    assert {row["images"] for row in rows} == {12}
    assert rows[12]["dial"] == 0.5
    assert rows[12]["gmacs_ratio"] == pytest.approx(0.7, abs=0.02)
    found = told(capsys, "eval", *FLAGS, "--policy", str(path), "--gmacs-ratio", "0.6")
    assert found["gmacs_ratio"] == pytest.approx(0.6, abs=0.02)


def test_show_and_bench_take_the_rule(tmp_path, capsys):
    picture = tmp_path / "x.png"
    flags = ["--backbone", "fashion", "--images", "fashion", "--count", "1", "--workers", "0"]
    assert main(["show", *flags, "--policy", "rule", "--output", str(picture)]) == 0
    assert Image.open(io.BytesIO(picture.read_bytes())).height > 100
    flags = ["--backbone", "fashion", "--keep", "0.7", "0.5", "0.3", "--batch-sizes", "2", "--dtypes", "float32"]
    flags += ["--seconds", "0.1", "--no-compiled", "--transition", "merge", "--policy", "rule", "--json"]
    (row,) = told(capsys, "bench", *flags, "--output", str(tmp_path))
    assert [kept["least"] for kept in row["tokens_kept"]] == [137, 98, 59], "of 196, the same in every image"
    assert [kept["most"] for kept in row["tokens_kept"]] == [137, 98, 59]
