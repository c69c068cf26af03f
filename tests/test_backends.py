"""Which backend computes, and a worked example of a backend of one's own."""

from collections import Counter

import pytest
import torch
from conftest import half_vit, needs_kernels, policy_for, tiny_vit

from tokengame import backends, kernels
from tokengame.backbones import wrap
from tokengame.backends import BACKENDS, CompiledBlocks, CompiledDecisions, TorchBackend
from tokengame.config import GameConfig
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, check_contract
from tokengame.packed.attention import deterministic_attention, fastest_attention, unfused_attention
from tokengame.runtime import prune

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))


class CountingBackend(TorchBackend):
    """A worked example of a backend: it computes as PyTorch's and counts calls and rows."""

    name = "counting"

    def __init__(self, backbone, attention):
        super().__init__(backbone, attention)
        self.calls, self.attended = Counter(), []

    def embed(self, images):
        self.calls["embed"] += 1
        return super().embed(images)

    def attend(self, qkv, layout, bias=None):
        self.attended.append(layout.rows)
        return super().attend(qkv, layout, bias)

    def observe(self, heads, layout, bias, request):
        self.calls["observe"] += 1
        return super().observe(heads, layout, bias, request)

    def merge(self, tokens, keep, kept_layout):
        self.calls["merge"] += 1
        return super().merge(tokens, keep, kept_layout)

    def head(self, x, layout, size=None):
        self.calls["head"] += 1
        return super().head(x, layout, size)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (CountingBackend, *BACKENDS))


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_a_backend_is_a_class_and_one_line_of_the_registry(transition, model, monkeypatch):
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2), transition=transition))
    expected = game.predict(game.play(IMAGES, Scripted(TABLE)))
    monkeypatch.setattr(backends, "BACKENDS", (CountingBackend, *BACKENDS))
    state = game.play(IMAGES, Scripted(TABLE))
    assert type(state.backend) is CountingBackend
    assert torch.equal(game.predict(state), expected)
    assert state.backend.calls == Counter(embed=1, observe=2, head=1) + Counter(merge=2 * (transition == "merge"))
    rows = [3 * 17, *(int(n.sum()) + 3 for n in state.kept)]
    assert state.backend.attended == (rows if transition == "drop" else rows[:1]), "the others are cross-attention"


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_the_example_keeps_the_contract(transition, model):
    check_contract(TokenGame(wrap(model), GameConfig(transition=transition)), IMAGES)


@pytest.mark.usefixtures("counting")
def test_a_pruned_model_runs_on_the_example(model):
    fast = prune(model, policy_for(model), 0.5)
    backend = fast.game.backend_for(IMAGES)
    assert backend.name == "counting"
    assert torch.equal(fast.game.play(IMAGES, fast.actor, backend=backend).x, fast.game.play(IMAGES, fast.actor).x)
    assert backend.calls["embed"] == 1, "a game uses one backend to its end"


def test_the_first_backend_that_is_ready_is_chosen(model, monkeypatch):
    class Never(CountingBackend):
        @classmethod
        def ready(cls, *_):
            return None

    monkeypatch.setattr(backends, "BACKENDS", (Never, CountingBackend, TorchBackend))
    assert type(backends.choose(wrap(model), IMAGES)) is CountingBackend
    monkeypatch.setattr(backends, "BACKENDS", (Never, TorchBackend, CountingBackend))
    assert type(backends.choose(wrap(model), IMAGES)) is TorchBackend


def chosen(model, images, attention=fastest_attention):
    return type(backends.choose(wrap(model), images, attention))


@torch.no_grad()
def test_float32_runs_on_pytorch(model):
    assert chosen(model, IMAGES) is TorchBackend
    assert chosen(model.double(), IMAGES.double()) is TorchBackend


@needs_kernels
@torch.no_grad()
def test_bfloat16_runs_on_the_compiled_kernels_as_far_as_they_know_the_model():
    images = IMAGES.bfloat16()
    for attention in (fastest_attention, deterministic_attention):
        assert chosen(half_vit(), images, attention) is CompiledBlocks
        assert chosen(half_vit(qk_norm=True), images, attention) is CompiledDecisions
    assert chosen(tiny_vit(num_heads=2).bfloat16(), images) is TorchBackend, "heads of 16 numbers"
    assert chosen(half_vit(), images, unfused_attention) is TorchBackend, "that kernel was requested"
    assert chosen(half_vit(), IMAGES) is TorchBackend
    with kernels.disabled():
        assert chosen(half_vit(), images) is TorchBackend
    with torch.enable_grad():
        assert chosen(half_vit(), images) is TorchBackend
