"""The game on random decisions, and one test (`test_trap_...`) for each defect of the authors' published code."""

import inspect
from dataclasses import replace

import pytest
import torch
from conftest import tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengame.backbones import wrap
from tokengame.config import GameConfig, TrainConfig, with_overrides
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.state import ordered_dither
from tokengame.game.testing import Scripted, check_contract, kept_agents, masked_forward, merged_forward
from tokengame.learning.trainer import Trainer

MODELS = {size: tiny_vit(img_size=size, reg_tokens=1) for size in [(16, 16), (32, 32), (24, 40)]}


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from(sorted(MODELS)),
    stages=st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple),
    batch=st.integers(1, 4),
    lean=st.floats(-2, 2),
    seed=st.integers(0, 999),
    transition=st.sampled_from(["drop", "merge"]),
)
@torch.no_grad()
def test_packed_equals_the_slow_reference(size, stages, batch, lean, seed, transition):
    """Any stages (block 0 and "all" too), batch size, input size and decisions, from nearly all kept to one."""
    backbone = wrap(MODELS[size])
    game = TokenGame(backbone, GameConfig(stages=stages, transition=transition))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, *size, generator=generator)
    table = torch.randn(len(stages), batch, backbone.patches, generator=generator) + lean
    state = game.play(images, Scripted(table))
    expected = (masked_forward if transition == "drop" else merged_forward)(backbone, stages, images, table)
    assert float((game.predict(state) - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(torch.stack(state.kept), kept_agents(table).sum(2))


@pytest.mark.filterwarnings("ignore:.*see packed rows")
@pytest.mark.parametrize("stages", [(1,), (3,), (0, 2)])
@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_patches_are_left_out_after_the_last_attention_and_nothing_changes(stages, transition, model):
    """A class token alone goes through the last MLP; a model that averages patches keeps them."""
    game, seen = TokenGame(wrap(model), GameConfig(stages=stages, transition=transition)), []
    handle = model.blocks[-1].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    images = torch.randn(3, 3, 32, 32)
    found = game.predict(game.play(images, lambda obs: torch.ones(len(obs.token))))
    handle.remove()
    assert seen == [3]
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-4)
    assert not wrap(tiny_vit(global_pool="avg", class_token=False)).reads_prefix_only


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_an_image_does_not_depend_on_its_batch(transition):
    game = TokenGame(wrap(MODELS[32, 32]), GameConfig(transition=transition))
    images, table = torch.randn(5, 3, 32, 32), torch.randn(3, 5, 16)
    with torch.no_grad():
        together = game.predict(game.play(images, Scripted(table)))
        alone = torch.cat([game.predict(game.play(images[b : b + 1], Scripted(table[:, b : b + 1]))) for b in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_no_agent_observes_padding(transition):
    """Images with 1 to 16 agents left: each agent observes the same in the batch and alone."""
    game = TokenGame(wrap(MODELS[32, 32]), GameConfig(stages=(0, 1, 2), transition=transition))
    images, table = torch.randn(5, 3, 32, 32), torch.randn(3, 5, 16)
    table[0] += torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0])[:, None]

    def played(some):
        decide, state = Scripted(table[:, some]), game.reset(images[some])
        for _ in range(2):
            logits = decide(game.observe(state))
            state = game.step(state, logits > 0, logits)
        return game.observe(state)

    together = played(slice(0, 5))
    assert together.layout.counts[0] == 1 < together.layout.longest
    for image in range(5):
        alone, own = played(slice(image, image + 1)), together.image == image
        for found, expected in ((together.features[own], alone.features), (together.token[own], alone.token)):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_gradients_flow_through_a_game(transition, model):
    """To every weight, and the same as through the slow reference."""
    backbone, images = wrap(model.requires_grad_(True)), torch.randn(2, 3, 32, 32)
    game, table = TokenGame(backbone, GameConfig(stages=(1, 2), transition=transition)), torch.randn(2, 2, 16)
    reference = inspect.unwrap(masked_forward if transition == "drop" else merged_forward)  # of its `no_grad`
    gradients = []
    for logits in (game.predict(game.play(images, Scripted(table))), reference(backbone, (1, 2), images, table)):
        gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_contract_catches_a_game_that_only_masks(model):
    class Masking(TokenGame):
        def step(self, state, keep, logits):
            return super().step(state, torch.ones_like(keep), logits)

    with pytest.raises(AssertionError, match=r"not carried out"):
        check_contract(Masking(wrap(model), GameConfig()), torch.randn(2, 3, 32, 32))


@torch.no_grad()
def test_features_equal_the_attention_of_timm(model):
    """Log attention from the class token in the block that the stage observes, against softmax(q k) computed here."""
    images, backbone = torch.randn(3, 3, 32, 32), wrap(model)
    for transition, observed in [("drop", 1), ("merge", 2)]:
        game = TokenGame(backbone, GameConfig(stages=(2,), transition=transition))
        obs = game.observe(game.reset(images))
        x = backbone.embed(images)
        for block in model.blocks[:observed]:
            x = block(x)
        block = model.blocks[observed]
        q, k, v = block.attn.qkv(block.norm1(x)).view(3, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attention = (q[:, :, :1] @ k.transpose(2, 3) / 4).softmax(3)[:, :, 0, 1:]  # [B, H, N]
        expected = (17 * attention).log().permute(0, 2, 1).reshape(-1, 2)
        torch.testing.assert_close(obs.features[:, :2], expected, atol=1e-4, rtol=1e-4)
        mean = (attention.sum(1)).log()
        centred = (mean - mean.mean(1, keepdim=True)).reshape(-1)
        torch.testing.assert_close(obs.features[:, 2], centred, atol=1e-4, rtol=1e-4)
        if transition == "merge":
            values = torch.nn.functional.normalize(v[..., :8].transpose(1, 2).flatten(2)[:, 1:], dim=2)
            similar = values @ values.transpose(1, 2) - 3 * torch.eye(16)
            torch.testing.assert_close(obs.features[:, 4], similar.amax(2).reshape(-1), atol=1e-4, rtol=1e-4)
            for image in range(3):
                for agent in range(16):
                    lead = [float(similar[image, agent, j]) for j in range(16) if mean[image, j] > mean[image, agent]]
                    found = float(obs.features[16 * image + agent, 6])
                    assert found == pytest.approx(max(lead, default=-1.0), abs=1e-4)


def test_dither_thins_evenly_at_any_share():
    """At threshold k every 8 x 8 window keeps k of 64; at a quarter every 2 x 2 keeps one; at half no neighbours."""
    grid = ordered_dither(24, 16).view(24, 16)
    for k in range(65):
        kept = (grid.sigmoid() > 1 - k / 64).float()
        counts = torch.nn.functional.avg_pool2d(kept[None], 8, 1) * 64
        assert torch.allclose(counts, torch.full_like(counts, k))
    quarter, half = grid.sigmoid() > 0.75, grid.sigmoid() > 0.5
    assert (torch.nn.functional.avg_pool2d(quarter.float()[None], 2, 1) == 0.25).all()
    assert not (half[:, 1:] & half[:, :-1]).any()


@torch.no_grad()
def test_dither_is_observed_by_position(model):
    """Also by agents that are left in the middle of a game."""
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2)))
    first, logits = game.reset(torch.randn(3, 3, 32, 32)), torch.randn(48)
    for state in (first, game.step(first, logits > 0, logits)):
        obs = game.observe(state)
        assert torch.equal(obs.features[:, -1], ordered_dither(4, 4)[obs.agent])
    assert len(obs.agent) < 48


# Traps: defects of the authors' published code


def trainer_for(model, **changes):
    defaults = {"game": {"stages": (1, 2)}, "updates": 10, "dtype": "float32"}
    return Trainer(model, with_overrides(with_overrides(TrainConfig.from_preset("rl4evit"), defaults), changes), seed=1)


def play(trainer, batch=4):
    torch.manual_seed(0)
    return trainer.rollout(torch.randn(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:.*see packed rows")
def test_trap_masks_tokens_are_really_removed(model):
    """Work shrinks with the tokens: a later block's MLP gets the rows of kept tokens and no more."""
    game, seen = TokenGame(wrap(model), GameConfig(stages=(1,))), []
    handle = model.blocks[-2].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    with torch.no_grad():
        state = game.play(torch.randn(3, 3, 32, 32), Scripted(torch.randn(1, 3, 16)))
    handle.remove()
    assert seen == [int(state.kept[0].sum()) + 3]
    assert seen[0] < 3 * 17


def test_trap_pruned_agents_are_in_no_loss(model):
    trainer = trainer_for(model)
    rollout, outcome, _ = play(trainer)
    experience = trainer.experience(rollout, outcome)
    assert len(experience.action) == int(outcome.acting.sum()) < outcome.acting.numel()


def test_trap_rows_of_experience_belong_to_their_image_and_agent(model):
    """Each row's return is the return of exactly that agent of that image at that stage."""
    trainer = trainer_for(model, ppo={"gamma": 1.0, "gae_lambda": 1.0})
    rollout, outcome, _ = play(trainer)
    tag = torch.arange(outcome.acting[0].numel(), dtype=torch.float).view(1, *outcome.acting.shape[1:])
    stamped = replace(outcome, acting=outcome.acting, alive=torch.zeros_like(outcome.alive))
    trainer.rewards = lambda _: tag.expand(outcome.acting.shape).clone()
    returns = trainer.experience(rollout, stamped).returns
    expected = torch.cat([obs.image * 16 + obs.agent for obs in rollout.observations]).float()
    torch.testing.assert_close(returns, expected)


def test_trap_gae_and_normalisation_are_on(model):
    trainer = trainer_for(model)
    rollout, outcome, _ = play(trainer)
    advantage = trainer.experience(rollout, outcome).advantage
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantage.std(correction=0)) == pytest.approx(1, abs=1e-4)
    bandit = trainer_for(model, ppo={"gamma": 0.0}).experience(rollout, outcome).advantage
    assert not torch.allclose(advantage, bandit), "later stages give no credit"


def test_trap_the_last_step_does_not_bootstrap(model):
    """Returns at the last stage are the reward itself, whatever the critic says."""
    trainer = trainer_for(model)
    rollout, outcome, _ = play(trainer)
    torch.nn.init.constant_(trainer.critic.rest[-1].bias, 50.0)
    returns = trainer.experience(rollout, outcome).returns[-len(rollout.action[-1]) :]
    expected = trainer.rewards(outcome)[-1].reshape(-1)[rollout.rows[-1]]
    torch.testing.assert_close(returns, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("transition", "stages", "blocks"),
    [("drop", (1, 2), (1, 1)), ("merge", (1, 2), (1, 10 / 12)), ("merge", (1, 3), (2, 2 / 12)), ("drop", (3,), (0,))],
)
def test_agents_are_charged_for_the_blocks_their_row_goes_through(transition, stages, blocks, model):
    """Of four blocks, patches do nothing in the last; a decision inside an attention comes after keys and values."""
    trainer = trainer_for(model, game={"stages": stages, "transition": transition})
    segments = trainer._segments(play(trainer)[0])
    assert segments.tolist() == pytest.approx([share / (4 * 16) for share in blocks])


def test_trap_the_first_ratio_is_one(model):
    metrics = trainer_for(model).update(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))
    assert metrics["losses/first_ratio_error"] < 1e-5


def test_trap_values_are_taken_where_decisions_happen(model):
    """The critic runs exactly once per decision, on the very observations that the actor had."""
    trainer, seen = trainer_for(model), []
    rollout, outcome, _ = play(trainer)
    handle = trainer.critic.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    trainer.experience(rollout, outcome)
    handle.remove()
    assert [id(obs) for obs in seen] == [id(obs) for obs in rollout.observations]


def test_trap_evaluation_does_not_sample(model):
    trainer = trainer_for(model)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        first, second = (trainer.game.play(images, trainer.actor) for _ in range(2))
    assert torch.equal(first.position, second.position)


def test_trap_pruning_everything_leaves_one_agent_and_finite_rewards(model):
    trainer = trainer_for(model)
    trainer.actor.rest[-1].bias.data += torch.tensor([60.0, -60.0])
    rollout, outcome, _ = play(trainer)
    assert (outcome.alive.sum(2) == 1).all()
    assert not torch.cat(rollout.action).any(), "the game's floor is not the agent's action"
    assert trainer.rewards(outcome).isfinite().all()


@pytest.mark.parametrize(("size", "patch", "dim", "batch"), [((24, 40), 8, 48, 3), ((42, 42), 14, 32, 1)])
def test_trap_no_size_is_a_constant(size, patch, dim, batch):
    trainer = trainer_for(tiny_vit(img_size=size, patch_size=patch, embed_dim=dim))
    metrics = trainer.update(torch.randn(batch, 3, *size), torch.zeros(batch, dtype=torch.long))
    assert all(torch.tensor(v).isfinite() for k, v in metrics.items() if "variance" not in k)


def test_nan_weights_stop_and_say_where(model):
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(TokenGameError, match="native model's prediction is not finite in update 0"):
        trainer_for(model).update(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))


def test_nan_rewards_stop_and_say_where(model):
    trainer = trainer_for(model)
    object.__setattr__(trainer.config.reward, "alpha", float("nan"))  # no setting can be
    with pytest.raises(TokenGameError, match="reward 'share' is not finite in update 0"):
        trainer.update(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
