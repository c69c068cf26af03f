"""Fused forward against the same games step by step, and when games are played step by step instead."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import pytest
import torch
from conftest import half_vit, needs_kernels, normal, off, policy_for, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp, LayerNorm, RmsNorm, SwiGLU
from torch import nn

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.config import GameConfig
from tokengame.game import TokenGame
from tokengame.kernels import library
from tokengame.measure.profile import peak_memory, time_shares
from tokengame.measure.synthetic import synthetic_model
from tokengame.policies.networks import START, BudgetActor, ContextActor, TokenActor
from tokengame.runtime import cascade, fused, prune
from tokengame.runtime.torch_compile import CompiledGame

pytestmark = needs_kernels
MODELS = {
    "plain": half_vit(),
    "another seed, 257 rows": half_vit(1, img_size=128),
    "registers": half_vit(reg_tokens=2),
    "layer scale": half_vit(init_values=1.0),
    "one head": half_vit(num_heads=1),
    "any size": half_vit(dynamic_img_size=True),
    "not square": half_vit(img_size=(48, 80), patch_size=16),
    "classes that fill no tile": half_vit(num_classes=45),
    "quick GELU": half_vit(act_layer="quick_gelu"),
}


WHOLE = {
    name: half_vit(**changes).float()
    for name, changes in {
        "no class token": {"class_token": False, "global_pool": "avg"},
        "average pooling": {"global_pool": "avg"},
        "distilled": {"name": "deit_tiny_distilled_patch16_224"},
        "pre norm": {"pre_norm": True},
        "patches of 4": {"img_size": 16, "patch_size": 4},
        "patches of 14": {"img_size": 56, "patch_size": 14},
        "no classes": {"num_classes": 0},
        "heads of 24": {"embed_dim": 96, "num_heads": 4},
        "heads of 22, an MLP of 299": {"embed_dim": 352, "num_heads": 16, "mlp_ratio": 0.85, "qkv_bias": False},
        "heads of 72, no class token": {
            "embed_dim": 288,
            "num_heads": 4,
            "class_token": False,
            "global_pool": "avg",
            "act_layer": "gelu_tanh",
        },
        "any size": {"dynamic_img_size": True},
    }.items()
}
"""in float32, in which the mean of rows is the same however it is computed"""


BLOCKS = {
    "SwiGLU": {"name": "vit_giant_patch14_dinov2", "mlp_ratio": 4},
    "SwiGLU of 44": {"name": "vit_giant_patch14_dinov2", "mlp_ratio": 1.375},
    "two layers for gates and values, norm": {"mlp_layer": SwiGLU, "scale_mlp_norm": True, "mlp_ratio": 1.7},
    "gates last, without biases": {"mlp_layer": partial(GluMlp, bias=False)},
    "norm in the MLP": {"scale_mlp_norm": True},
    "norm in an MLP of 300": {"scale_mlp_norm": True, "mlp_ratio": 4.7},
    "norm of attention": {"scale_attn_norm": True},
    "norm of attention, heads of 24": {"scale_attn_norm": True, "embed_dim": 96, "num_heads": 4},
    "RMS norms": {"norm_layer": RmsNorm},
    "RMS norms everywhere": {"norm_layer": RmsNorm, "scale_mlp_norm": True, "scale_attn_norm": True, "mlp_ratio": 1.3},
}
"""blocks of other parts"""


class Reluctant(ContextActor):
    def forward(self, obs):
        return super().forward(obs).clamp(min=0.1)


def game_of(model, stages=(1, 2), transition="merge"):
    return TokenGame(wrap(model), GameConfig(stages=stages, transition=transition))


def actor_of(game, seed=0):
    """A policy to which every feature matters."""
    actor = ContextActor(game.backbone.heads, len(game.stages), START["merge"])
    noise = torch.randn(actor.weight.shape, generator=torch.Generator().manual_seed(seed))
    actor.weight.data.add_(0.3 * noise)
    return actor.requires_grad_(False)


def budget_of(game, seed=0):
    shares = (0.7, 0.55, 0.3)[: len(game.stages)]
    actor = BudgetActor(game.backbone.heads, len(game.stages), START["merge"], shares)
    actor.load_state_dict(actor_of(game, seed).state_dict())
    return actor.requires_grad_(False)


def paper_actor_of(game, seed=0, hidden=(64, 256, 64)):
    """RL4EViT's, of which the token and the id both matter."""
    torch.manual_seed(seed)
    actor = TokenActor(game.backbone.dim, game.backbone.patches, hidden)
    for layer in (actor.token, *actor.rest[::2]):
        layer.bias.data.add_(0.3 * torch.randn_like(layer.bias))
    actor.rest[-1].weight.data.mul_(100)
    return actor.requires_grad_(False)


def images_for(model, number, seed=0):
    return normal(number, 3, *(model.patch_embed.img_size or (40, 24)), seed=seed).to(model.pos_embed.dtype)


def forward(game, images, actor, threshold=0.0, tokens_before=False):
    return fused.forward(game, game.backend_for(images), images, actor, threshold, tokens_before)


def step_by_step(game, images, actor, threshold=0.0, tokens_before=False):
    return cascade.step_by_step(game, game.backend_for(images), images, actor, threshold, tokens_before)


def assert_same(found, expected):
    """The same agents are left, and the tokens before the first decision are the same bytes."""
    assert all(torch.equal(some, other) for some, other in zip(found.kept, expected.kept, strict=True))
    assert torch.equal(found.alive, expected.alive)
    assert off(found.logits, expected.logits) < 1e-3
    assert (found.tokens_before is None) == (expected.tokens_before is None)
    assert found.tokens_before is None or torch.equal(found.tokens_before, expected.tokens_before)


@pytest.mark.usefixtures("level")
@settings(max_examples=60)
@given(key=st.sampled_from(list(MODELS)), number=st.integers(1, 11), seed=st.integers(0, 99),
       stages=st.sampled_from([(0,), (2,), (0, 1), (1, 2), (0, 1, 2)]), tokens_before=st.booleans(),
       threshold=st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, 99.0]))  # fmt: skip
@torch.no_grad()
def test_equals_the_game_step_by_step(key, number, stages, tokens_before, threshold, seed):
    """From all tokens kept to one of each image."""
    game, images = game_of(MODELS[key], stages), images_for(MODELS[key], number, seed)
    tokens_before &= threshold > -math.inf  # nothing falls back where nothing is pruned
    settings = game, images, actor_of(game, seed), threshold, tokens_before
    assert_same(forward(*settings), step_by_step(*settings))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("key", BLOCKS)
@torch.no_grad()
def test_norms_and_gates_equal_pytorch(key):
    model = half_vit(**BLOCKS[key]).float()
    assert (type(model.blocks[0].mlp.norm) is nn.Identity) != BLOCKS[key].get("scale_mlp_norm", False)
    for module in model.modules():
        if isinstance(module, LayerNorm | RmsNorm):  # each norm its own, and not around zero
            module.weight.data.copy_(1 + 0.3 * normal(*module.weight.shape, seed=5))
    game, images = game_of(model), images_for(model, 5)
    request = game, images, actor_of(game), 0.0, False
    found, in_steps = forward(*request), step_by_step(*request)
    assert game.backend_for(images).name == "compiled"
    with kernels.disabled():
        expected = step_by_step(*request)
    assert torch.equal(found.alive, expected.alive)
    assert off(found.logits, expected.logits) < 1e-5
    assert off(in_steps.logits, expected.logits) < 1e-5


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("off", [0.0, 30.0])
@torch.no_grad()
def test_zeros_that_fill_up_a_norm_do_not_count(off):
    """A hidden layer of 44 numbers of which each row is nearly constant."""
    torch.manual_seed(0)
    model = half_vit(mlp_layer=SwiGLU, scale_mlp_norm=True, mlp_ratio=44 / 64)
    assert type(model.blocks[0].mlp.norm) is LayerNorm
    for block in model.float().blocks:
        block.mlp.fc1_x.bias.add_(off)
        block.mlp.fc1_g.weight.mul_(0.01)
        block.mlp.fc1_g.bias.add_(5)
    game, images = game_of(model), images_for(model, 3)
    found = forward(game, images, actor_of(game))
    with kernels.disabled():
        expected = step_by_step(game, images, actor_of(game))
    assert torch.equal(found.alive, expected.alive)
    assert (found.logits - expected.logits).norm() < 1e-4 * expected.logits.norm()


@pytest.mark.usefixtures("level")
@settings(max_examples=60)
@given(key=st.sampled_from(sorted(WHOLE)), number=st.integers(1, 9), seed=st.integers(0, 99),
       transition=st.sampled_from(["drop", "merge"]), stages=st.sampled_from([(1,), (1, 2), (1, 3), (1, 2, 3)]),
       actor=st.sampled_from([actor_of, budget_of]), threshold=st.sampled_from([-math.inf, 0.0, 0.5]))  # fmt: skip
@torch.no_grad()
def test_any_model_and_transition_equals_the_game_step_by_step(key, number, transition, stages, actor, threshold, seed):
    """Whatever embeds and reads the tokens, whatever observes, and wherever the game ends."""
    game, images = game_of(WHOLE[key], stages, transition), images_for(WHOLE[key], number, seed)
    request = game, images, actor(game, seed), threshold, False
    found, expected = forward(*request), step_by_step(*request)
    assert_same(found, expected)
    assert off(found.logits, expected.logits) < 1e-5


@pytest.mark.usefixtures("level")
@settings(max_examples=40)
@given(key=st.sampled_from(sorted(MODELS)), number=st.integers(1, 9), seed=st.integers(0, 99),
       transition=st.sampled_from(["drop", "merge"]), stages=st.sampled_from([(0,), (0, 1, 2), (1, 2), (0, 1, 2, 3)]),
       hidden=st.sampled_from([(64, 256, 64), (8,), (40, 24)]),
       threshold=st.sampled_from([-math.inf, -1.0, 0.0, 99.0]))  # fmt: skip
@torch.no_grad()
def test_the_papers_actor_equals_the_game_step_by_step(key, number, transition, stages, hidden, threshold, seed):
    """It reads no features, so that it may also decide before the first block; hidden layers may fill no tile."""
    model = MODELS[key]
    config = GameConfig(stages=stages, transition=transition)
    game, images = TokenGame(wrap(model), config, features=False), images_for(model, number, seed)
    request = game, images, paper_actor_of(game, seed, hidden), threshold, False
    assert_same(forward(*request), step_by_step(*request))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("stages", [(0,), (0, 2)])
@torch.no_grad()
def test_a_line_sees_zeros_before_the_first_block(stages):
    game, images = game_of(MODELS["plain"], stages, "drop"), images_for(MODELS["plain"], 3)
    request = game, images, actor_of(game), 0.0, False
    assert_same(forward(*request), step_by_step(*request))


@pytest.mark.usefixtures("level", "two_threads")
@torch.no_grad()
def test_the_papers_actor_gives_an_image_the_same_bytes_in_any_batch_and_for_any_threads():
    model = MODELS["another seed, 257 rows"]
    game, images = game_of(model, (0, 1, 2), "drop"), images_for(model, 12)
    actor = paper_actor_of(game)
    together = forward(game, images, actor)
    assert len(set(together.kept[1].tolist())) > 3, "every image has its own count"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for some in (slice(0, 12), slice(5, 6), slice(3, 10)):
            found = forward(game, images[some], actor)
            assert torch.equal(found.logits, together.logits[some])
            assert torch.equal(found.alive, together.alive[some])


@torch.no_grad()
def test_changes_of_the_papers_actor_take_effect_at_once():
    model = half_vit()
    game, images = game_of(model, (0, 1), "drop"), images_for(model, 3)
    actor = paper_actor_of(game)
    for part in (actor.identity, actor.token.weight, actor.rest[0].bias):
        before = forward(game, images, actor)
        part.data.add_(torch.randn_like(part))
        after = forward(game, images, actor)
        assert not torch.equal(after.alive, before.alive)
        assert_same(after, step_by_step(game, images, actor))


@torch.no_grad()
def test_the_rule_with_budgets_is_played_in_one_call(monkeypatch):
    """`prune(model)`, without anything else, for any numbers of tokens."""
    model = tiny_vit(embed_dim=64, num_heads=2)
    fast, images = prune(model), images_for(model, 5)
    expected = step_by_step(fast.game, images, fast.actor)
    monkeypatch.setattr(TokenGame, "observe", lambda *_: pytest.fail("step by step"))
    found = fast.predict(images)
    assert torch.equal(found.alive, expected.alive)
    assert off(found.logits, expected.logits) < 1e-5


@pytest.mark.usefixtures("level", "two_threads")
@torch.no_grad()
def test_an_image_has_the_same_bytes_in_any_batch_and_for_any_threads():
    model = MODELS["another seed, 257 rows"]
    game, images = game_of(model), images_for(model, 24)
    actor = actor_of(game)
    together = forward(game, images, actor, 0.3)
    assert len(set(together.kept[1].tolist())) > 5, "every image has its own count"
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for some in (slice(0, 24), slice(5, 6), slice(3, 10)):
            found = forward(game, images[some], actor, 0.3)
            assert torch.equal(found.logits, together.logits[some])
            assert torch.equal(found.alive, together.alive[some])


def test_two_callers_at_once_do_not_disturb_each_other():
    model = MODELS["plain"]
    game, images = game_of(model), images_for(model, 6)
    actor = actor_of(game)

    @torch.no_grad()
    def predicted(number):
        return forward(game, images[: number + 1], actor).logits

    expected = [predicted(number) for number in range(6)]
    with ThreadPoolExecutor(2) as pool:
        contexts = [copy_context() for _ in range(60)]  # which hold the instructions
        for index, found in enumerate(pool.map(lambda n: contexts[n].run(predicted, n % 6), range(60))):
            assert torch.equal(found, expected[index % 6])


@torch.inference_mode()
def test_a_pruned_model_runs_fused_and_the_same_images_fall_back(monkeypatch):
    model = half_vit()
    policy = policy_for(model)
    policy.card["game"]["cascade_margin"] = 0.05
    fast, images = prune(model, policy, 0.5), images_for(model, 12)
    found = fast.predict(images)
    assert 0 < len(found.fallback) < 12
    assert torch.equal(fast.trace(images)[-1], found.alive)
    monkeypatch.setattr(TokenGame, "observe", lambda *_: pytest.fail("step by step"))
    assert torch.equal(fast(images), found.logits)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "forward", lambda *_: None)
    expected = fast.predict(images)
    assert torch.equal(found.fallback, expected.fallback)
    assert off(found.logits, expected.logits) < 1e-3
    assert all(torch.equal(some, other) for some, other in zip(found.kept, expected.kept, strict=True))


def test_a_pruned_model_runs_fused_where_the_caller_records_gradients(monkeypatch):
    model = half_vit()
    fast, images = prune(model, policy_for(model), 0.5), images_for(model, 3)
    with torch.no_grad():
        expected = fast(images)
    with monkeypatch.context() as patch:
        patch.setattr(TokenGame, "observe", lambda *_: pytest.fail("step by step"))
        assert torch.equal(fast(images), expected)
    logits = fast.train()(images)
    assert logits.requires_grad
    assert off(logits.detach(), expected) < 0.03


@torch.inference_mode()
def test_synthetic_decisions_run_fused_too(monkeypatch):
    fast = synthetic_model(half_vit(), GameConfig(stages=(1, 2), transition="merge"), (0.7, 0.4))
    images = images_for(fast.model, 8)
    fitted = fast.actor.fit(fast, images, 2)
    assert forward(fast.game, images, fast.actor) is not None
    found = fast.predict(images)
    assert torch.equal(torch.stack(found.kept), fitted[:, :8])
    monkeypatch.setattr(fused, "forward", lambda *_: None)
    assert torch.equal(fast.predict(images).alive, found.alive)


@torch.no_grad()
def test_other_games_policies_and_models_are_played_step_by_step():
    model = half_vit()
    game, images = game_of(model), images_for(model, 2)
    actor = actor_of(game)

    def runs(game=game, images=images, actor=actor):
        return forward(game, images, actor) is not None

    assert runs()
    assert not runs(CompiledGame(game.backbone, game.config))
    assert not runs(TokenGame(game.backbone, game.config, features=False))
    assert not runs(actor=lambda obs: obs.attention)
    assert runs(actor=paper_actor_of(game))
    with pytest.raises((IndexError, RuntimeError)):
        cascade.predict(game, images, TokenActor(64, 15, (8, 8)), 0.0)  # an id is missing
    assert not runs(actor=actor_of(game).double())
    assert not runs(actor=Reluctant(game.backbone.heads, 2, START["merge"])), "its class does not say that it is linear"
    assert not runs(images=images.float())
    with torch.enable_grad():
        assert not runs()
    with kernels.disabled():
        assert not runs()
    hooked, changed = actor_of(game), actor_of(game)
    hooked.register_forward_hook(lambda *_: None)
    assert not runs(actor=hooked)
    changed.forward = lambda obs: obs.attention
    assert not runs(actor=changed)
    other = game_of(model)
    other.observe = lambda state: TokenGame.observe(other, state)
    assert not runs(other)
    model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="see packed rows"):
        assert not runs()


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(2 * x)


def hooked(actor):
    actor.rest[1].register_forward_hook(lambda *_: None)


def in_int8(actor):
    torchao = pytest.importorskip("torchao.quantization", reason="needs tokengame[int8]")
    torchao.quantize_(actor, torchao.Int8WeightOnlyConfig())


CHANGES = {
    "a hook": hooked,
    "a module around a layer": lambda actor: actor.rest.__setitem__(0, nn.Sequential(actor.rest[0])),
    "another activation": lambda actor: actor.rest.__setitem__(1, nn.ReLU()),
    "another forward": lambda actor: setattr(actor, "rest", Twice(*actor.rest)),
    "one more activation": lambda actor: actor.rest.append(nn.Tanh()),
    "nothing but a layer": lambda actor: setattr(actor, "rest", nn.Linear(64, 2)),
    "ids of one number": lambda actor: setattr(actor, "identity", nn.Parameter(actor.identity[:, :1].clone())),
    "a bias of one number": lambda actor: setattr(actor.token, "bias", nn.Parameter(torch.ones(1))),
    "in int8": in_int8,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_actor_of_the_paper_is_played_step_by_step(change):
    model = MODELS["plain"]
    game, images = game_of(model, (0, 1), "drop"), images_for(model, 3)
    actor = paper_actor_of(game)
    assert forward(game, images, actor) is not None
    CHANGES[change](actor)
    assert forward(game, images, actor) is None
    found, expected = cascade.predict(game, images, actor, 0.0), step_by_step(game, images, actor)
    assert torch.equal(found.alive, expected.alive)


@pytest.mark.parametrize("widths", [(32, 64, 2), (128, 64, 2), (64, 64, 1), (64, 64, 3)])
@torch.no_grad()
def test_layers_of_an_actor_that_do_not_fit_together_are_not_read(widths):
    game, images = game_of(MODELS["plain"], (0,), "drop"), images_for(MODELS["plain"], 2)
    actor = paper_actor_of(game, hidden=(64,))
    first, hidden, last = widths
    actor.rest = nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))
    with pytest.raises((RuntimeError, ValueError)):
        cascade.predict(game, images, actor, 0.0)


@pytest.mark.usefixtures("level")
@torch.no_grad()
def test_a_token_that_is_not_a_number_is_dropped_as_step_by_step():
    game, images = game_of(MODELS["plain"], (0, 2), "drop"), images_for(MODELS["plain"], 4)
    images[1, 0, 0, 0] = math.nan
    for seed in range(6):
        found, expected = (play(game, images, paper_actor_of(game, seed)) for play in (forward, step_by_step))
        assert torch.equal(found.alive, expected.alive)
        assert not found.alive[1, 0]


@torch.no_grad()
def test_changed_weights_take_effect_at_once():
    model = half_vit()
    game, images = game_of(model), images_for(model, 3)
    actor = actor_of(game)
    for part in (model.blocks[-1].attn.qkv.weight, model.pos_embed, model.head.bias, actor.weight):
        before = forward(game, images, actor).logits
        part.data.add_(torch.randn_like(part))
        after = forward(game, images, actor)
        assert not torch.equal(after.logits, before)
        assert_same(after, step_by_step(game, images, actor))


@torch.no_grad()
def test_a_policy_of_another_shape_is_refused():
    game, images = game_of(MODELS["plain"]), images_for(MODELS["plain"], 2)
    for other in (game_of(MODELS["plain"], (1,)), game_of(MODELS["one head"])):
        with pytest.raises((IndexError, RuntimeError)):
            cascade.predict(game, images, actor_of(other), 0.0)


@torch.inference_mode()
def test_time_shares_and_peak_memory_of_compiled_games():
    model = half_vit(img_size=64)
    fast = synthetic_model(model, GameConfig(stages=(1, 2), transition="merge"), (0.7, 0.4))
    images = images_for(model, 8)
    fast.actor.fit(fast, images)
    shares = time_shares(fast, images)
    assert all(shares[part] > 0 for part in ("policy", "packing", "projections and MLP", "embedding and head"))
    rows = 8 * 65 * 64 * 2 / 2**20  # MiB of one copy of the tokens
    assert rows < peak_memory(lambda: fast(images), images.device) < 50 * rows


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(library, "_checksum_of", lambda _: 1)
    with pytest.warns(UserWarning, match="install tokengame again"):
        assert library.loaded.__wrapped__().library is None
