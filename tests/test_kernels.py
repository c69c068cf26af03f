"""Our own kernels for bfloat16 against float32, float64 and loops, and when they step aside for PyTorch's."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import policy_for, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention, GELUTanh, Mlp
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tokengame import kernels, weights
from tokengame.backbone import Backbone, Heads
from tokengame.config import GameConfig
from tokengame.decisions import absorb, features_of, similarity_of
from tokengame.game import TokenGame
from tokengame.ops import Layout, ordered_dither
from tokengame.runtime import PrunedViT
from tokengame.state import State
from tokengame.testing import Scripted
from tokengame.weights import weights_of

pytestmark = pytest.mark.skipif(
    kernels.library() is None, reason="no kernels of our own: no AVX-512 bfloat16 in the processor, or no compiler"
)


@pytest.fixture(scope="module", params=[1, 2], ids=["avx512", "amx"])
def level(request):
    """Instructions that the kernels are held to."""
    if kernels.library().set_up(request.param) != request.param:
        pytest.skip("no AMX in this processor")
    yield
    kernels.library().set_up(2)


@pytest.fixture
def model():
    return half_vit()


def half_vit(seed=0, **changes):
    return tiny_vit(seed, **({"embed_dim": 64, "num_heads": 2} | changes)).bfloat16()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layout_of(counts):
    return Layout(counts, torch.device("cpu"))


def off(found, exact):
    """How far off, as a share."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def game_of(model, transition="drop"):
    return TokenGame(Backbone(model), GameConfig(stages=(1, 2), transition=transition))


@torch.no_grad()
def played(game, images, decide=lambda obs: torch.ones(len(obs.agent))):
    return game.logits(game.play(images, decide))


# Attention


def written_out(q, k, v, asking, counts, bias, scale):
    parts, bias = [], q.new_zeros(len(k)) if bias is None else bias.to(q.dtype)
    for own, key, value, add in zip(q.split(asking), k.split(counts), v.split(counts), bias.split(counts), strict=True):
        heads = zip(own.unbind(1), key.unbind(1), value.unbind(1), strict=True)
        parts.append(torch.stack([(a @ b.T * scale + add).softmax(1) @ c for a, b, c in heads], 1))
    return torch.cat(parts)


lengths = st.sampled_from([1, 16, 17, 31, 32, 33, 300]) | st.integers(1, 70)
pairs = st.lists(st.tuples(lengths, st.just(0) | st.integers(0, 40)), min_size=1, max_size=4)


@given(pairs=pairs, heads=st.integers(1, 3), width=st.sampled_from([32, 64]), biased=st.booleans(),
       scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))  # fmt: skip
def test_attention_is_as_near_to_double_precision_as_pytorchs(level, pairs, heads, width, biased, scale, seed):
    asking, counts = [few for few, _ in pairs], [few + more for few, more in pairs]
    (q, *_), (_, k, v) = (normal(sum(n), 3, heads, width, seed=seed).unbind(1) for n in (asking, counts))
    bias = normal(sum(counts), seed=seed + 1).abs() * 3 if biased else None
    found = kernels.attention(q, k, v, layout_of(asking), layout_of(counts), bias, scale)
    settings = asking, counts, bias, width**-0.5 if scale is None else scale
    exact, theirs = (written_out(*(t.to(dtype) for t in (q, k, v)), *settings) for dtype in (torch.double, q.dtype))
    assert off(found, exact) < min(0.004, 1.5 * off(theirs, exact) + 5e-4)


# Whole models

ARCHITECTURES = {
    "plain": {},
    "one head": {"num_heads": 1},
    "register": {"reg_tokens": 1},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 1.0},
    "no bias": {"qkv_bias": False},
    "pre norm": {"pre_norm": True},
    "dynamic size": {"dynamic_img_size": True},
    "large patches, not square": {"img_size": (48, 80), "patch_size": 16},
    "patches that timm embeds": {"img_size": 16, "patch_size": 4},
}


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", ARCHITECTURES)
@torch.no_grad()
def test_predictions_are_as_near_to_float32_as_pytorchs(level, key, transition, monkeypatch):
    model = half_vit(**ARCHITECTURES[key])
    game, exact = game_of(model, transition), game_of(copy.deepcopy(model).float(), transition)
    images = normal(9, 3, *model.patch_embed.img_size)
    decide = Scripted(normal(2, 9, game.backbone.patches, seed=1).float() + 0.5)
    ours = played(game, images, decide), played(game, images[:1], decide)
    assert game.backbone.tiled(images), "the test is blind"
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert not game.backbone.tiled(images)
    theirs, best = played(game, images, decide), played(exact, images.float(), decide)
    spread = 2 if transition == "merge" else 0  # images in which somebody had two keepers equally alike
    errors = [((some - best).norm(dim=1) / best.norm(dim=1)).sort().values[-1 - spread] for some in (ours[0], theirs)]
    assert errors[0] <= 1.5 * errors[1] + 0.003
    assert off(ours[1], ours[0][:1]) < 0.01, "batch of one"


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_rows_are_the_same_bytes_in_any_batch_and_for_any_threads(level, transition, two_threads):
    """Of 257 rows an image, so that a thread takes a few images at a time through a stretch."""
    model, images = half_vit(img_size=128), normal(9, 3, 128, 128)
    game, table = game_of(model, transition), normal(2, 9, 256, seed=1).float()

    def rows(some):
        seen, decide = [], Scripted(table[:, some])
        state = game.play(images[some], lambda obs: (seen.append(obs.features), decide(obs))[1])
        closed = game.backbone.close(game.end, state.x, state.layout, state.bias)
        assert game.backbone.tiled(closed)
        return [state.x, closed, *seen]

    together = rows(slice(0, 9))
    alone = [torch.cat(parts) for parts in zip(*(rows(slice(i, i + 1)) for i in range(9)), strict=True)]
    torch.set_num_threads(1)
    for found in (alone, rows(slice(0, 9))):
        assert all(torch.equal(some, expected) for some, expected in zip(found, together, strict=True))


def test_two_callers_at_once_get_the_same_bytes(level, model):
    game, images, decide = game_of(model, "merge"), normal(6, 3, 32, 32), Scripted(normal(2, 6, 16).float())
    expected = [played(game, images[:n], decide) for n in range(1, 7)]
    with ThreadPoolExecutor(2) as pool:
        for index, found in enumerate(pool.map(lambda n: played(game, images[: n % 6 + 1], decide), range(60))):
            assert torch.equal(found, expected[index % 6])


def test_images_of_other_sizes_and_channels_are_timms_business(model):
    dynamic, images = half_vit(dynamic_img_size=True), normal(2, 3, 40, 24)
    with torch.no_grad():
        assert off(played(game_of(dynamic), images), dynamic(images)) < 0.02
        for channels in (1, 4):
            with pytest.raises(RuntimeError, match="channels"):
                Backbone(model).embed(normal(2, channels, 32, 32))


# Decisions

agents = st.lists(st.sampled_from([1, 16, 33]) | st.integers(1, 70), min_size=1, max_size=4)
a_state = {"counts": agents | st.integers(2, 40).map(lambda n: [n, n]), "prefix": st.integers(1, 2),
           "heads": st.integers(1, 3), "width": st.sampled_from([32, 64]), "sized": st.booleans(),
           "seed": st.integers(0, 99)}  # fmt: skip


def about_to_decide(counts, prefix, heads, width, sized, seed):
    """Random rows, of which `counts` agents of each image are left of 70; keys and values are parts of one tensor."""
    layout, generator = layout_of([prefix + n for n in counts]), torch.Generator().manual_seed(seed)
    q, k, v = normal(layout.rows, 3, heads, width, seed=seed).unbind(1)
    left = [torch.randperm(70, generator=generator)[:n].sort().values for n in counts]
    position = torch.cat([part for own in left for part in (torch.full((prefix,), -1), own)])
    size = torch.randint(1, 6, (layout.rows,), generator=generator).float() if sized else None
    seen = Heads(layout.first(q), k, v, width**-0.5)
    x = normal(layout.rows, 96, seed=seed + 1) * torch.rand(layout.rows, 1, generator=generator).bfloat16()
    return State(x, position, layout, layout_of(counts), 70, ordered_dither(7, 10), size, seen)


@given(**a_state)
def test_agents_observe_what_float32_does(level, **random):
    with torch.no_grad():
        state = about_to_decide(**random)
        found, heads, blind = features_of(state, state.heads, True), random["heads"], features_of(state, state.heads, False)
        exact = Heads(*(t.float() for t in (state.heads.query, state.heads.keys, state.heads.values)), state.heads.scale)
        alike = similarity_of(state, exact)
        expected = features_of(replace(state, heads=exact, similarity=alike), exact, True)
    torch.testing.assert_close(found[:, : heads + 2], expected[:, : heads + 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, heads + 2], expected[:, heads + 2], atol=5e-3, rtol=0)
    torch.testing.assert_close(found[:, heads + 3], expected[:, heads + 3])
    centred = state.agents.pad(expected[:, heads])
    ahead = centred[:, None] - centred[:, :, None]  # who is ahead by a hair may count or not
    least, most = (state.agents.unpad(alike.where(ahead > d, -1).amax(2).clamp(min=-1)) for d in (1e-3, -1e-3))
    assert ((found[:, heads + 4] > least - 5e-3) & (found[:, heads + 4] < most + 5e-3)).all()
    assert torch.equal(found[:, -1], state.dither[state.of_agents(state.position)])
    found[:, [heads + 2, heads + 4]] = 0
    assert torch.equal(blind, found)


def decided(state, share, seed):
    """[A] who stays, at least one of each image, and the layout of the rows that do."""
    keep = torch.rand(state.agents.rows, generator=torch.Generator().manual_seed(seed)) < share
    keep[state.agents.start + state.agents.count // 2] = True
    return keep, layout_of([n + state.prefix for n in state.agents.per_image(keep)])


@given(**a_state, share=st.sampled_from([0.0, 0.2, 0.9]))
@torch.no_grad()
def test_absorbing_equals_loops(level, share, seed, **random):
    """In float64; of keepers who are equally alike but for rounding either may absorb."""
    state = about_to_decide(**random, seed=seed)
    keep, left = decided(state, share, seed)
    found = absorb(state, keep, left)
    stays, prefix = keep.tolist(), state.prefix
    x, values = state.x.double(), state.heads.values[..., : random["width"] // 2].flatten(1).double()
    size = torch.ones(len(x)) if state.size is None else state.size
    row, first, expected = state.agent_rows.tolist(), 0, []
    for image, count in enumerate(state.agents.counts):
        own = range(first, first + count)
        first, keepers = first + count, [a for a in own if stays[a]]
        expected += [([row[own[0]] - prefix + p], -1) for p in range(prefix)]
        for agent in own:
            if stays[agent]:
                assert found.absorber[agent] == agent
                continue
            alike = F.cosine_similarity(values[row[agent]], values[[row[k] for k in keepers]])
            chosen = int(found.absorber[agent])
            assert alike[keepers.index(chosen)] > alike.max() - 2e-3, "another image, somebody gone or less alike"
        expected += [([row[a] for a in own if found.absorber[a] == k], state.position[row[k]]) for k in keepers]
    assert found.position.tolist() == [int(position) for _, position in expected]
    assert found.size.tolist() == [float(size[rows].sum()) for rows, _ in expected]
    for to, (rows, _) in enumerate(expected):
        if len(rows) == 1:
            assert torch.equal(found.x[to], state.x[rows[0]])
        else:
            direction = F.normalize((x[rows] * size[rows, None]).sum(0), dim=0)
            torch.testing.assert_close(found.x[to].double(), direction * x[rows].norm(dim=1).max(), atol=1e-5, rtol=2**-8)


@given(**a_state, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@torch.no_grad()
def test_no_patch_is_lost_or_made_and_nobody_leaving_changes_nothing(level, share, seed, **random):
    state = about_to_decide(**random, seed=seed)
    keep, left = decided(state, share, seed)
    found, size = absorb(state, keep, left), torch.ones(len(state.x)) if state.size is None else state.size
    assert len(found.x) == len(found.size) == len(found.position) == left.rows
    for after, before in zip(found.size.split(left.counts), size.split(state.layout.counts), strict=True):
        assert after.sum() == before.sum()
    if keep.all():
        for now, then in ((found.x, state.x), (found.size, size), (found.position, state.position)):
            assert torch.equal(now, then)


# Models that change


def doubled(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(3)


def doubled_by_inference(model):
    with torch.inference_mode():
        model.blocks[1].attn.qkv.bias.add_(1)


def put_in_place(model):
    for _ in range(3):  # where the first was may be the third
        model.blocks[1].mlp.fc1.weight.data = model.blocks[1].mlp.fc1.weight.data * 2


CHANGES = {
    "weight in place": doubled,
    "bias in inference mode": doubled_by_inference,
    "norm": lambda model: nn.init.constant_(model.blocks[2].norm2.weight, 3),
    "patches": lambda model: nn.init.constant_(model.patch_embed.proj.bias, 3),
    "weight's data": lambda model: model.blocks[1].mlp.fc1.weight.data.mul_(3),
    "other data": put_in_place,
    "other weight": lambda model: setattr(model.blocks[1].mlp.fc1, "weight", nn.Parameter(normal(256, 64))),
    "no bias": lambda model: setattr(model.blocks[1].mlp.fc2, "bias", None),
    "other MLP": lambda model: setattr(model.blocks[1], "mlp", Mlp(64, 128).bfloat16()),
    "other activation": lambda model: setattr(model.blocks[1].mlp, "act", nn.ReLU()),
    "no layer scale": lambda model: setattr(model.blocks[1], "ls1", nn.Identity()),
    "other patches": lambda model: setattr(model, "patch_embed", half_vit(seed=1).patch_embed),
    "state dict": lambda model: model.load_state_dict(half_vit(seed=1, init_values=0.3).state_dict()),
    "float32": lambda model: doubled(model.float()),
    "float32 and back": lambda model: (doubled(model.float()), model.bfloat16()),
}


@pytest.mark.parametrize("key", CHANGES)
@torch.no_grad()
def test_a_model_that_changed_predicts_as_it_is_now(key):
    model, images = half_vit(init_values=0.3), normal(3, 3, 32, 32)
    game = game_of(model)
    before = played(game, images)
    assert game.backbone.tiled(images)
    CHANGES[key](model)
    expected = model(images.to(game.backbone.dtype))
    assert off(before, expected) > 0.08, "the test is blind"
    for now in (game, game_of(model)):
        assert off(played(now, images.to(game.backbone.dtype)), expected) < 0.03


@torch.no_grad()
def test_blocks_of_another_model_are_seen(model):
    images = normal(3, 3, 32, 32)
    played(game_of(model), images)
    model.blocks = half_vit(seed=1).blocks
    assert off(played(game_of(model), images), model(images)) < 0.03


@torch.no_grad()
def test_a_model_made_in_inference_mode_may_change_too():
    with torch.inference_mode():
        model = half_vit()
        game, images = game_of(model), normal(3, 3, 32, 32)
        before = played(game, images)
        doubled(model)
        assert off(before, model(images)) > 0.08, "the test is blind"
        assert off(played(game, images), model(images)) < 0.03


WATCHERS = {
    "hook": lambda mlp, see: mlp.register_forward_hook(lambda *_: see()),
    "hook before": lambda mlp, see: mlp.fc1.register_forward_pre_hook(lambda *_: see()),
    "hook on everything": lambda mlp, see: register_module_forward_hook(lambda module, *_: module is mlp and see()),
    "own forward": lambda mlp, see: setattr(mlp, "forward", lambda rows: (see(), type(mlp).forward(mlp, rows))[1]),
}


@pytest.mark.parametrize("key", WATCHERS)
def test_who_watches_a_part_of_the_model_sees_it_at_work(key, model):
    game, images, seen = game_of(model), normal(3, 3, 32, 32), []
    expected = played(game, images)
    handle = WATCHERS[key](model.blocks[1].mlp, lambda: seen.append(1))
    try:
        assert off(played(game, images), expected) < 0.02
        assert len(seen) == 1
    finally:
        handle.remove() if handle else delattr(model.blocks[1].mlp, "forward")
    assert torch.equal(played(game, images), expected)
    assert len(seen) == 1


def test_dropout_is_pytorchs_business():
    """Of a model that trains, or of a layer alone, for which estimates of uncertainty leave it on."""
    model, images = half_vit(proj_drop_rate=0.5), normal(3, 3, 32, 32)
    game = game_of(model)
    before = played(game, images)
    for part in (model, model.blocks[1].mlp.drop1):
        part.train()
        assert weights_of(model) is None
        assert not torch.equal(played(game, images), played(game, images))
        model.eval()
        assert torch.equal(played(game, images), before)


UNSUPPORTED = {
    "qk norm": {"qk_norm": True},
    "norm of attention": {"scale_attn_norm": True},
    "norm in the MLP": {"scale_mlp_norm": True},
    "tanh": {"act_layer": GELUTanh},
    "ReLU": {"act_layer": nn.ReLU},
    "heads of 24": {"embed_dim": 96, "num_heads": 4},
    "hidden 80": {"mlp_ratio": 1.25},
    "SwiGLU": {"name": "vit_giant_patch14_dinov2", "mlp_ratio": 4},
}


@pytest.mark.parametrize("key", UNSUPPORTED)
@torch.no_grad()
def test_blocks_that_do_something_else_are_pytorchs_business(key):
    model, images = half_vit(**UNSUPPORTED[key]), normal(3, 3, 32, 32)
    assert weights_of(model) is None
    assert off(played(game_of(model), images), model(images)) < 0.03


@torch.no_grad()
def test_blocks_with_different_heads_do_not_write_beyond_their_memory():
    model, images = half_vit(num_heads=1), normal(3, 3, 32, 32)
    model.blocks[1].attn = Attention(64, 4, attn_head_dim=64, qkv_bias=True).eval().bfloat16()
    assert weights_of(model) is None
    assert off(played(game_of(model), images), model(images)) < 0.03


class Doubling(torch.Tensor):
    """A weight that is kept in another way than it says, like those of quantised models."""

    @staticmethod
    def __new__(cls, own):
        return torch.Tensor._make_wrapper_subclass(cls, own.shape, dtype=own.dtype)

    def __init__(self, own):
        self.own = own

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].own)
        return func(*(2 * arg.own if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


@torch.no_grad()
def test_weights_that_are_no_plain_tensors_are_pytorchs_business(model):
    model.blocks[1].mlp.fc1.weight = nn.Parameter(Doubling(model.blocks[1].mlp.fc1.weight.data), requires_grad=False)
    images = normal(3, 3, 32, 32)
    assert not weights._plain(model.blocks[1]), "what is packed is not there: the process would end here"
    assert off(played(game_of(model), images), model(images)) < 0.03


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@torch.no_grad()
def test_copies_and_pickles_of_a_model_in_use_predict_the_same_and_on_their_own(duplicate):
    model = tiny_vit(embed_dim=64)
    fast, images = PrunedViT(model, policy_for(model), 0.5).bfloat16(), normal(4, 3, 32, 32)
    expected = fast(images)
    assert fast.game.backbone.tiled(images)
    twin = duplicate(fast)
    assert torch.equal(twin(images), expected)
    doubled(twin.model)
    assert off(twin(images), expected) > 0.05
    assert torch.equal(fast(images), expected)


# Stepping aside


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_without_the_library_everything_is_nearly_the_same(transition, model, monkeypatch):
    game, images = game_of(model, transition), normal(3, 3, 32, 32)
    decide = Scripted(normal(2, 3, 16, seed=1).float() + 0.5)
    ours = played(game, images, decide)
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert not kernels.take(images)
    theirs = played(game, images, decide)
    assert not torch.equal(ours, theirs), "the test is blind"
    assert off(ours, theirs) < 0.03


@torch.no_grad()
def test_which_rows_are_taken(monkeypatch):
    assert kernels.take(normal(2, 32))
    assert not any(kernels.take(normal(2, 32).to(dtype)) for dtype in (torch.float32, torch.float16, torch.float64))
    assert not kernels.take(normal(2, 32).requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.take(normal(2, 32))
    with torch.enable_grad():
        assert not kernels.take(normal(2, 32))
    monkeypatch.setenv("TOKENGAME_KERNELS", "none")
    assert kernels.library.__wrapped__() is None


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_gradients_reach_every_weight_after_the_kernels_ran(transition, model):
    game, images = game_of(model.requires_grad_(True), transition), normal(2, 3, 32, 32)
    decide = Scripted(normal(2, 2, 16, seed=1).float())
    ours = played(game, images, decide)
    state = game.play(images, decide)
    assert not game.backbone.tiled(state.x)
    logits = game.logits(state)
    assert off(ours, logits.detach()) < 0.03
    for gradient in torch.autograd.grad(logits.float().square().sum(), list(model.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


@torch.no_grad()
def test_pytorch_finds_the_processor_as_it_left_it(level, model, two_threads):
    """Its kernels remember how they set up the tiles of each thread."""
    a, b, heads, game = normal(300, 200), normal(200, 500), normal(2, 3, 4, 70, 64), game_of(model, "merge")
    before = a @ b, F.scaled_dot_product_attention(*heads.unbind(1))
    played(game, normal(5, 3, 32, 32))
    assert game.backbone.tiled(a)
    assert torch.equal(a @ b, before[0])
    played(game, normal(5, 3, 32, 32))
    assert torch.equal(F.scaled_dot_product_attention(*heads.unbind(1)), before[1])
