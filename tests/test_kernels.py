"""The compiled kernels against float32, float64 and loops, and when PyTorch's run instead."""

import copy
import ctypes
import mmap
import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import half_vit, layout_of, needs_kernels, normal, off
from hypothesis import given
from hypothesis import strategies as st

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.backends import CompiledBlocks
from tokengame.config import GameConfig
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted
from tokengame.kernels import functions, library, structs
from tokengame.kernels.plain import Activation, LinearWeights
from tokengame.kernels.weights import pack

pytestmark = needs_kernels
both_levels = pytest.mark.usefixtures("level")
both_transitions = pytest.mark.parametrize("transition", ["drop", "merge"])


@pytest.fixture
def model():
    return half_vit()


def game_of(model, transition="drop"):
    return TokenGame(wrap(model), GameConfig(stages=(1, 2), transition=transition))


@torch.no_grad()
def predicted(game, images, decide=lambda obs: torch.ones(len(obs.agent))):
    return game.predict(game.play(images, decide))


def is_compiled(game, images):
    """Whether the compiled kernels run whole blocks of such images."""
    return isinstance(game.backend_for(images), CompiledBlocks)


# Attention


def unfused(q, k, v, queries, counts, bias, scale):
    parts, bias = [], torch.zeros(len(k)) if bias is None else bias
    images = zip(q.split(queries), k.split(counts), v.split(counts), bias.split(counts), strict=True)
    for query, key, value, add in images:
        heads = zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
        parts.append(torch.stack([(a @ b.T * scale + add.to(a.dtype)).softmax(1) @ c for a, b, c in heads], 1))
    return torch.cat(parts)


lengths = st.sampled_from([1, 16, 17, 31, 32, 33, 300]) | st.integers(1, 70)
pairs = st.lists(st.tuples(lengths, st.just(0) | st.integers(0, 40)), min_size=1, max_size=4)


@both_levels
@given(pairs=pairs, heads=st.integers(1, 3), width=st.sampled_from([32, 64]), biased=st.booleans(),
       scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))  # fmt: skip
def test_attention_is_as_near_to_double_precision_as_pytorchs(pairs, heads, width, biased, scale, seed):
    queries, counts = [few for few, _ in pairs], [few + more for few, more in pairs]
    q = normal(sum(queries), 2, heads, width)[:, 0]
    _, k, v = normal(sum(counts), 3, heads, width, seed=seed).unbind(1)
    bias = normal(sum(counts), seed=seed + 1).abs() * 3 if biased else None
    found = functions.attention(q, k, v, layout_of(queries), layout_of(counts), bias, scale)
    settings = queries, counts, bias, width**-0.5 if scale is None else scale
    exact, native = (unfused(*(t.to(dtype) for t in (q, k, v)), *settings) for dtype in (torch.double, q.dtype))
    assert off(found, exact) < min(0.004, 1.5 * off(native, exact) + 5e-4)


# Models

ARCHITECTURES = {
    "plain": {},
    "one head": {"num_heads": 1},
    "register": {"reg_tokens": 1},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 1.0},
    "no bias": {"qkv_bias": False},
    "pre norm": {"pre_norm": True},
    "dynamic size": {"dynamic_img_size": True},
    "large patches, not square": {"img_size": (48, 80), "patch_size": 16},
    "patches of another size": {"img_size": 16, "patch_size": 4},
    "quick GELU": {"act_layer": "quick_gelu"},
    "GELU by tanh": {"act_layer": "gelu_tanh"},
}


@both_levels
@both_transitions
@pytest.mark.parametrize("key", ARCHITECTURES)
@torch.no_grad()
def test_predictions_are_as_near_to_float32_as_pytorchs(key, transition):
    model = half_vit(num_classes=50, **ARCHITECTURES[key])
    game, exact = game_of(model, transition), game_of(copy.deepcopy(model).float(), transition)
    images = normal(9, 3, *model.patch_embed.img_size)
    decide = Scripted(normal(2, 9, game.backbone.patches, seed=1).float() + 0.5)
    compiled, single = predicted(game, images, decide), predicted(game, images[:1], decide)
    assert is_compiled(game, images)
    with kernels.disabled():
        assert not is_compiled(game, images)
        on_pytorch, best = predicted(game, images, decide), predicted(exact, images.float(), decide)
    clear = 7 if transition == "merge" else 9  # in two images a pruned token may be as similar to two kept ones
    errors = [(some - best).norm(dim=1).sort().values[:clear].norm() / best.norm() for some in (compiled, on_pytorch)]
    assert 0 < errors[0] <= 1.5 * errors[1] + 0.001
    assert off(single, compiled[:1]) < 0.01, "a batch of one"


@pytest.mark.usefixtures("level", "two_threads")
@both_transitions
@torch.no_grad()
def test_rows_are_the_same_bytes_in_any_batch_and_for_any_threads(transition):
    """Of 257 rows an image, so that a thread runs a few images at a time through several half-blocks."""
    game, images = game_of(half_vit(img_size=128), transition), normal(9, 3, 128, 128)
    table = normal(2, 9, 256, seed=1).float()

    def rows(some):
        features, decide = [], Scripted(table[:, some])
        state = game.play(images[some], lambda obs: (features.append(obs.features), decide(obs))[1])
        assert isinstance(state.backend, CompiledBlocks)
        return [state.x, state.backend.finish(game.end, state.x, state.layout, state.bias), *features]

    together = rows(slice(0, 9))
    single = [torch.cat(parts) for parts in zip(*(rows(slice(i, i + 1)) for i in range(9)), strict=True)]
    torch.set_num_threads(1)
    for found in (single, rows(slice(0, 9))):
        assert all(torch.equal(some, expected) for some, expected in zip(found, together, strict=True))


@pytest.mark.usefixtures("two_threads")
@torch.no_grad()
def test_threads_at_different_blocks_do_not_disturb_each_other():
    """One thread may attend to cached keys and values while the other is blocks ahead with its own images."""
    backbone = wrap(half_vit(img_size=128))
    game, images = TokenGame(backbone, GameConfig(stages=(0, 3), transition="merge")), normal(24, 3, 128, 128)
    table = normal(2, 24, 256, seed=1).float() + torch.linspace(-1, 3, 24)[:, None]  # some images have few tokens
    single = [game.play(images[i : i + 1], Scripted(table[:, i : i + 1])).x for i in range(24)]
    for _ in range(10):
        assert torch.equal(game.play(images, Scripted(table)).x, torch.cat(single))


@both_levels
def test_two_callers_at_once_get_the_same_bytes(model):
    game, images, decide = game_of(model, "merge"), normal(6, 3, 32, 32), Scripted(normal(2, 6, 16).float())
    expected = [predicted(game, images[:n], decide) for n in range(1, 7)]
    with ThreadPoolExecutor(2) as pool:
        contexts = [copy_context() for _ in range(60)]  # which hold the instructions
        tasks = pool.map(lambda n: contexts[n].run(predicted, game, images[: n % 6 + 1], decide), range(60))
        for index, found in enumerate(tasks):
            assert torch.equal(found, expected[index % 6])


@torch.no_grad()
def test_images_of_another_size_are_embedded_by_timm():
    model, images = half_vit(dynamic_img_size=True), normal(2, 3, 40, 24)
    assert off(predicted(game_of(model), images), model(images)) < 0.02


@torch.no_grad()
def test_kernels_refuse_what_pytorch_refuses(model):
    for channels in (1, 4):
        with pytest.raises(RuntimeError, match="channels"):
            predicted(game_of(model), normal(2, channels, 32, 32))
    model.head.float()
    with pytest.raises(RuntimeError, match="dtype"):
        predicted(game_of(model), normal(2, 3, 32, 32))


# The interface


def declared():
    """Arguments of each function in csrc/interface.h, by their C++ types."""
    table = (library.SOURCES / "interface.h").read_text().split("struct Table {")[1]
    kinds = {}
    for name, arguments in re.findall(r"(?:int|long) \(\*(\w+)\)\(([^;]*)\);", table):
        each = [" ".join(argument.split()) for argument in arguments.split(",")]
        kinds[name] = "".join("p" if "*" in a else "d" if a.startswith("double ") else "l" for a in each)
    return kinds


def test_python_passes_what_the_functions_take():
    assert declared() == structs.SIGNATURES


def test_structs_of_other_sizes_are_not_used(monkeypatch):
    monkeypatch.setattr(library, "STRUCTS", structs.STRUCTS[:-1])
    with pytest.warns(UserWarning, match="install tokengame again"):
        assert library.loaded.__wrapped__().library is None


@torch.no_grad()
def test_without_memory_the_call_fails_in_a_sentence(model, monkeypatch):
    table = library._table(library.level(), torch.bfloat16)
    monkeypatch.setitem(table, "run_half_blocks", lambda *_: 1)
    with pytest.raises(MemoryError, match="make the batch smaller"):
        game_of(model).reset(normal(2, 3, 32, 32))


# Number formats and instruction sets


@both_levels
@both_transitions
@pytest.mark.parametrize("key", ARCHITECTURES)
@torch.no_grad()
def test_float32_is_the_native_model_and_the_same_game(key, transition):
    model = half_vit(num_classes=50, **ARCHITECTURES[key]).float()
    game, images = game_of(model, transition), normal(9, 3, *model.patch_embed.img_size).float()
    decide = Scripted(normal(2, 9, game.backbone.patches, seed=1).float() + 0.5)
    assert is_compiled(game, images)
    assert off(predicted(game, images), model(images)) < 1e-5
    pruned = predicted(game, images, decide)
    with kernels.disabled():
        assert off(pruned, predicted(game, images, decide)) < 1e-5


@both_levels
@given(rows=st.integers(1, 70), inputs=st.integers(1, 100), outputs=st.integers(1, 70), seed=st.integers(0, 99))
@torch.no_grad()
def test_products_of_any_size(rows, inputs, outputs, seed):
    """Rows that fill no block of 32, and weights that are padded to one, against double precision."""
    inputs = 32 * (inputs // 32 + 1)
    x, weight = normal(rows, inputs, seed=seed).float(), normal(outputs, inputs, seed=seed + 1).float()
    norm = structs.NormStruct((ones := torch.ones(inputs)).data_ptr(), (zeros := torch.zeros(inputs)).data_ptr(), 1e-6)
    found = functions.normed_linear(x, norm, pack(LinearWeights(weight, None)))
    exact = F.layer_norm(x.double(), (inputs,), ones.double(), zeros.double(), 1e-6) @ weight.double().T
    assert off(found, exact) < 1e-5


ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh_gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@both_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_activations_far_from_zero_too(dtype):
    """An MLP of one number for each of its inputs, from -40 to 40, against double precision."""
    values = torch.linspace(-40, 40, 4096).view(-1, 32)
    same, none = torch.eye(32), torch.zeros(32)
    norm = structs.NormStruct(none.data_ptr(), none.data_ptr(), 1e-6)
    for number, (name, exact) in enumerate(ACTIVATIONS.items()):
        assert get_args(Activation)[number] == name
        found = []
        for bias in values:  # the norm gives zeros, so the bias is what the activation gets
            layers = [pack(LinearWeights(same.to(dtype), b.to(dtype))) for b in (bias, none)]
            x, out = torch.zeros(1, 32, dtype=dtype), torch.empty(1, 32, dtype=dtype)
            fc1, fc2 = (layer.struct for layer in layers)
            mlp = structs.MlpStruct(norm=norm, fc1=fc1, fc2=fc2, hidden=32, activation=number)
            library.call("residual_mlp", dtype, x, 1, 32, ctypes.addressof(mlp), out, 1)
            found.append(out[0])
        inputs = values.to(dtype).double()
        wrong = (torch.stack(found).double() - exact(inputs)).abs() / inputs.abs().clamp(min=1)
        assert wrong.max() < {torch.float32: 3e-7, torch.bfloat16: 1 / 256}[dtype], name


@torch.no_grad()
def test_every_instruction_set_decides_alike(model):
    model = model.float()
    game, images = game_of(model, "merge"), normal(6, 3, 32, 32).float()
    results = {}
    for name in library.LEVELS[1 : library.loaded().highest + 2]:
        with kernels.limited(name):
            state = game.play(images, lambda obs: obs.features[:, 2] + obs.features[:, 6])
            results[name] = state.alive, game.predict(state)
    alive, logits = results["generic"]
    for found, other in results.values():
        assert torch.equal(found, alive)
        assert off(other, logits) < 1e-5


# When PyTorch runs instead


@torch.no_grad()
def test_which_rows_the_kernels_can_run(monkeypatch):
    assert kernels.usable(normal(2, 32))
    assert kernels.usable(normal(2, 32).float())
    assert not any(kernels.usable(normal(2, 32).to(dtype)) for dtype in (torch.float16, torch.float64))
    assert not kernels.usable(normal(2, 32).requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.usable(normal(2, 32))
    with torch.enable_grad():
        assert not kernels.usable(normal(2, 32))
    assert len(kernels.status(torch.float32).step_by_step) == 4
    with kernels.limited("none"):
        assert not kernels.usable(normal(2, 32))
        assert kernels.status(torch.float32).step_by_step == ("everything",)
    monkeypatch.setenv("TOKENGAME_KERNELS", "none")
    monkeypatch.setattr(library, "_limit_of_process", library._limit_of_process.__wrapped__)
    assert not kernels.usable(normal(2, 32))
    assert "switched off by TOKENGAME_KERNELS" in str(kernels.status())


@both_transitions
def test_gradients_reach_every_weight_after_the_kernels_ran(transition, model):
    game, images = game_of(model.requires_grad_(True), transition), normal(2, 3, 32, 32)
    decide = Scripted(normal(2, 2, 16, seed=1).float())
    compiled, logits = predicted(game, images, decide), game.predict(game.play(images, decide))
    assert off(compiled, logits.detach()) < 0.03
    for gradient in torch.autograd.grad(logits.float().square().sum(), list(model.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.usefixtures("level", "two_threads")
@torch.no_grad()
def test_pytorch_computes_the_same_after_the_kernels_ran(model):
    a, b, heads, game = normal(300, 200), normal(200, 500), normal(3, 2, 4, 70, 64), game_of(model, "merge")
    images = normal(5, 3, 32, 32)
    for compute in (lambda: a @ b, lambda: F.scaled_dot_product_attention(*heads)):
        before = compute()
        predicted(game, images)
        assert is_compiled(game, images)
        assert torch.equal(compute(), before)


@torch.no_grad()
def test_tiles_of_the_processor_are_left_as_they_were(model):
    """Other code that multiplies matrices in this thread may rely on its own configuration of them."""
    if library.level() < library.LEVELS.index("amx") - 1:
        pytest.skip("this processor has no tiles to be left as they were")
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("c4e2784907c3 c4e2794907c3"))  # ldtilecfg, ret; sttilecfg, ret
    load, store = (
        ctypes.CFUNCTYPE(None, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)) + at) for at in (0, 6)
    )
    images, layout, found = normal(5, 3, 32, 32), layout_of([17] * 5), ctypes.create_string_buffer(64)
    backend = game_of(model).backend_for(images)
    assert isinstance(backend, CompiledBlocks)
    x = backend.embed(images).flatten(0, 1)
    for settings in (bytes([1, *[0] * 15, 32, *[0] * 31, 8, *[0] * 15]), bytes(64)):  # a tile of 8 rows; none
        load(settings)
        ran = backend.run(0, 6, x, layout)
        backend.finish(6, ran.x, layout)
        store(found)
        load(bytes(64))
        assert found.raw == settings


@torch.no_grad()
def test_merge_games_observe_in_the_call_that_runs_the_blocks(model, monkeypatch):
    game, called = game_of(model, "merge"), []
    monkeypatch.setattr(functions, "observe", lambda *_: called.append("observe"))
    state = game.reset(normal(3, 3, 32, 32))
    assert torch.equal(game.observe(state).features, state.observed.features)
    assert state.observed.features.any()
    predicted(game, normal(3, 3, 32, 32))
    assert not called


@both_transitions
def test_frozen_models_run_with_gradients_enabled_too(model, transition):
    game, images = game_of(model.requires_grad_(False), transition), normal(4, 3, 32, 32)
    decide = Scripted(normal(2, 4, 16).float())
    found = game.predict(game.play(images, decide))
    assert off(found, predicted(game, images, decide)) < 0.02


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
    expected = predicted(game, images, decide)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = predicted(game_of(copy.deepcopy(model), "merge"), images, decide)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
