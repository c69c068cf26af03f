"""Our own kernels for bfloat16 against float32, float64 and loops, and when they step aside for PyTorch's."""

import copy
import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import half_vit, layout_of, needs_kernels, normal, off
from hypothesis import given
from hypothesis import strategies as st

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.config import GameConfig
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted

pytestmark = needs_kernels
both_levels = pytest.mark.usefixtures("level")
both_transitions = pytest.mark.parametrize("transition", ["drop", "merge"])


@pytest.fixture
def model():
    return half_vit()


def game_of(model, transition="drop"):
    return TokenGame(wrap(model), GameConfig(stages=(1, 2), transition=transition))


@torch.no_grad()
def played(game, images, decide=lambda obs: torch.ones(len(obs.agent))):
    return game.predict(game.play(images, decide))


# Attention


def unfused(q, k, v, asking, counts, bias, scale):
    parts, bias = [], torch.zeros(len(k)) if bias is None else bias
    for own, key, value, add in zip(q.split(asking), k.split(counts), v.split(counts), bias.split(counts), strict=True):
        heads = zip(own.unbind(1), key.unbind(1), value.unbind(1), strict=True)
        parts.append(torch.stack([(a @ b.T * scale + add.to(a.dtype)).softmax(1) @ c for a, b, c in heads], 1))
    return torch.cat(parts)


lengths = st.sampled_from([1, 16, 17, 31, 32, 33, 300]) | st.integers(1, 70)
pairs = st.lists(st.tuples(lengths, st.just(0) | st.integers(0, 40)), min_size=1, max_size=4)


@both_levels
@given(pairs=pairs, heads=st.integers(1, 3), width=st.sampled_from([32, 64]), biased=st.booleans(),
       scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))  # fmt: skip
def test_attention_is_as_near_to_double_precision_as_pytorchs(pairs, heads, width, biased, scale, seed):
    asking, counts = [few for few, _ in pairs], [few + more for few, more in pairs]
    q, k, v = normal(sum(asking), 2, heads, width)[:, 0], *normal(sum(counts), 3, heads, width, seed=seed).unbind(1)[1:]
    bias = normal(sum(counts), seed=seed + 1).abs() * 3 if biased else None
    found = kernels.attention(q, k, v, layout_of(asking), layout_of(counts), bias, scale)
    settings = asking, counts, bias, width**-0.5 if scale is None else scale
    exact, theirs = (unfused(*(t.to(dtype) for t in (q, k, v)), *settings) for dtype in (torch.double, q.dtype))
    assert off(found, exact) < min(0.004, 1.5 * off(theirs, exact) + 5e-4)


# Whole models

ARCHITECTURES = {
    "plain": {},
    "one head": {"num_heads": 1},
    "register": {"reg_tokens": 1},
    "two tokens that predict": {"name": "deit_tiny_distilled_patch16_224"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 1.0},
    "no bias": {"qkv_bias": False},
    "pre norm": {"pre_norm": True},
    "dynamic size": {"dynamic_img_size": True},
    "large patches, not square": {"img_size": (48, 80), "patch_size": 16},
    "patches that timm embeds": {"img_size": 16, "patch_size": 4},
}


@both_levels
@both_transitions
@pytest.mark.parametrize("key", ARCHITECTURES)
@torch.no_grad()
def test_predictions_are_as_near_to_float32_as_pytorchs(key, transition, monkeypatch):
    model = half_vit(num_classes=50, **ARCHITECTURES[key])
    game, exact = game_of(model, transition), game_of(copy.deepcopy(model).float(), transition)
    images = normal(9, 3, *model.patch_embed.img_size)
    decide = Scripted(normal(2, 9, game.backbone.patches, seed=1).float() + 0.5)
    ours, alone = played(game, images, decide), played(game, images[:1], decide)
    assert game.backbone.tiled(images), "the test is blind"
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert not game.backbone.tiled(images)
    theirs, best = played(game, images, decide), played(exact, images.float(), decide)
    clear = 7 if transition == "merge" else 9  # in two images an agent may have two keepers that are equally alike
    errors = [(some - best).norm(dim=1).sort().values[:clear].norm() / best.norm() for some in (ours, theirs)]
    assert 0 < errors[0] <= 1.5 * errors[1] + 0.001
    assert off(alone, ours[:1]) < 0.01, "a batch of one"


@pytest.mark.usefixtures("level", "two_threads")
@both_transitions
@torch.no_grad()
def test_rows_are_the_same_bytes_in_any_batch_and_for_any_threads(transition):
    """Of 257 rows an image, so that a thread takes a few images at a time through a stretch."""
    game, images = game_of(half_vit(img_size=128), transition), normal(9, 3, 128, 128)
    table = normal(2, 9, 256, seed=1).float()

    def rows(some):
        seen, decide = [], Scripted(table[:, some])
        state = game.play(images[some], lambda obs: (seen.append(obs.features), decide(obs))[1])
        assert game.backbone.tiled(state.x)
        return [state.x, game.backbone.close(game.end, state.x, state.layout, state.bias), *seen]

    together = rows(slice(0, 9))
    alone = [torch.cat(parts) for parts in zip(*(rows(slice(i, i + 1)) for i in range(9)), strict=True)]
    torch.set_num_threads(1)
    for found in (alone, rows(slice(0, 9))):
        assert all(torch.equal(some, expected) for some, expected in zip(found, together, strict=True))


@pytest.mark.usefixtures("two_threads")
@torch.no_grad()
def test_threads_on_their_own_way_through_a_stretch_do_not_meet():
    """One may ask what is left of a memory while the other is blocks ahead, all among its own images."""
    backbone = wrap(half_vit(img_size=128))
    game, images = TokenGame(backbone, GameConfig(stages=(0, 3), transition="merge")), normal(24, 3, 128, 128)
    table = normal(2, 24, 256, seed=1).float() + torch.linspace(-1, 3, 24)[:, None]  # some images are soon done
    alone = [game.play(images[i : i + 1], Scripted(table[:, i : i + 1])).x for i in range(24)]
    for _ in range(10):
        assert torch.equal(game.play(images, Scripted(table)).x, torch.cat(alone))


@both_levels
def test_two_callers_at_once_get_the_same_bytes(model):
    game, images, decide = game_of(model, "merge"), normal(6, 3, 32, 32), Scripted(normal(2, 6, 16).float())
    expected = [played(game, images[:n], decide) for n in range(1, 7)]
    with ThreadPoolExecutor(2) as pool:
        for index, found in enumerate(pool.map(lambda n: played(game, images[: n % 6 + 1], decide), range(60))):
            assert torch.equal(found, expected[index % 6])


@torch.no_grad()
def test_images_of_another_size_are_embedded_by_timm():
    model, images = half_vit(dynamic_img_size=True), normal(2, 3, 40, 24)
    assert off(played(game_of(model), images), model(images)) < 0.02


@torch.no_grad()
def test_what_pytorch_refuses_is_refused(model):
    for channels in (1, 4):
        with pytest.raises(RuntimeError, match="channels"):
            played(game_of(model), normal(2, channels, 32, 32))
    model.head.float()
    with pytest.raises(RuntimeError, match="dtype"):
        played(game_of(model), normal(2, 3, 32, 32))


# Stepping aside


@torch.no_grad()
def test_which_rows_are_taken(monkeypatch):
    assert kernels.usable(normal(2, 32))
    assert not any(kernels.usable(normal(2, 32).to(dtype)) for dtype in (torch.float32, torch.float16, torch.float64))
    assert not kernels.usable(normal(2, 32).requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.usable(normal(2, 32))
    with torch.enable_grad():
        assert not kernels.usable(normal(2, 32))
    monkeypatch.setenv("TOKENGAME_KERNELS", "none")
    assert kernels.library.__wrapped__() is None


@both_transitions
def test_gradients_reach_every_weight_after_the_kernels_ran(transition, model):
    game, images = game_of(model.requires_grad_(True), transition), normal(2, 3, 32, 32)
    decide = Scripted(normal(2, 2, 16, seed=1).float())
    ours, logits = played(game, images, decide), game.predict(game.play(images, decide))
    assert off(ours, logits.detach()) < 0.03
    for gradient in torch.autograd.grad(logits.float().square().sum(), list(model.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.usefixtures("level", "two_threads")
@torch.no_grad()
def test_pytorch_calculates_as_before(model):
    a, b, heads, game = normal(300, 200), normal(200, 500), normal(3, 2, 4, 70, 64), game_of(model, "merge")
    for calculate in (lambda: a @ b, lambda: F.scaled_dot_product_attention(*heads)):
        before = calculate()
        played(game, normal(5, 3, 32, 32))
        assert game.backbone.tiled(a)
        assert torch.equal(calculate(), before)


@torch.no_grad()
def test_tiles_of_the_processor_are_left_as_they_were(model):
    """Whoever else multiplies in this thread may rely on how it set them up."""
    if kernels.library().set_level(2) < 2:
        pytest.skip("no AMX in this processor")
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("c4e2784907c3 c4e2794907c3"))  # ldtilecfg, ret; sttilecfg, ret
    load, store = (
        ctypes.CFUNCTYPE(None, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)) + at) for at in (0, 6)
    )
    backbone, layout, found = wrap(model), layout_of([17] * 5), ctypes.create_string_buffer(64)
    x = backbone.embed(normal(5, 3, 32, 32)).flatten(0, 1)
    for settings in (bytes([1, *[0] * 15, 32, *[0] * 31, 8, *[0] * 15]), bytes(64)):  # a tile of 8 rows; none
        load(settings)
        ran = backbone.run(0, 6, x, layout)
        backbone.close(6, ran.x, layout)
        store(found)
        load(bytes(64))
        assert found.raw == settings


@torch.no_grad()
def test_what_agents_observe_is_looked_at_once(model, monkeypatch):
    """In passing, while a stretch is run; nobody looks again."""
    game, called = game_of(model, "merge"), []
    monkeypatch.setattr(kernels, "observe", lambda *_: called.append("again"))
    state = game.reset(normal(3, 3, 32, 32))
    assert torch.equal(game.observe(state).features, state.heads.seen.features)
    played(game, normal(3, 3, 32, 32))
    assert not called


@both_transitions
def test_frozen_models_are_run_with_gradients_enabled_too(model, transition):
    game, images = game_of(model.requires_grad_(False), transition), normal(4, 3, 32, 32)
    decide = Scripted(normal(2, 4, 16).float())
    found = game.predict(game.play(images, decide))
    assert off(found, played(game, images, decide)) < 0.02


@torch.no_grad()
def test_deciding_before_any_attention_observes_nothing(model):
    game = TokenGame(wrap(model), GameConfig(stages=(0, 2), transition="drop"))
    state = game.reset(normal(2, 3, 32, 32))
    assert state.heads is None
    assert not game.observe(state).features.any()


@torch.no_grad()
def test_the_global_number_format_does_not_matter(model):
    game, images = game_of(model, "merge"), normal(4, 3, 32, 32)
    decide = Scripted(normal(2, 4, 16).float())
    expected = played(game, images, decide)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = played(game_of(copy.deepcopy(model), "merge"), images, decide)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
