"""A worked example of a model family: a small Vision Transformer of plain torch modules, and its backbone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokengame import backbones
from tokengame.backbones import FAMILIES, Backbone, preprocessing_of, unfused, wrap
from tokengame.backbones.base import BlockCosts
from tokengame.baselines.evit import EViT
from tokengame.baselines.heuristics import KeepBest, attention, keep_all
from tokengame.baselines.tome import ToMe
from tokengame.config import GameConfig
from tokengame.data.transforms import transform_for
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, check_contract, kept_agents
from tokengame.packed.attention import unfused_attention
from tokengame.runtime import prune_by
from tokengame.runtime.macs import native_macs, pruned_macs

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class ToyBlock(nn.Module):
    """Attention with separate layers for queries, keys and values, then an MLP with ReLU; both behind a norm."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, mask=None):
        """[B, L, C] -> [B, L, C]; keys are hidden where `mask` [B, 1, 1, L] is false."""
        normed = self.norm1(x)
        parts = (layer(normed) for layer in (self.query, self.key, self.value))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    """4 x 4 patches of 8 x 8 pixels and a class token, which the classifier reads."""

    def __init__(self, dim=64, depth=4, heads=2, classes=5):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim))
        self.blocks = nn.ModuleList(ToyBlock(dim, heads) for _ in range(depth))
        self.norm, self.classifier = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def embed(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.position

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x[:, 0]))


class ToyBackbone(Backbone):
    """`ToyViT` on packed rows: all that a family must say."""

    def __init__(self, model):
        if model.patches.kernel_size != model.patches.stride:
            raise TokenGameError("ToyViT has patches that overlap")
        self.model = model
        self.depth, self.dim, self.heads = len(model.blocks), model.classifier.in_features, model.blocks[0].heads
        self.head_dim = self.dim // self.heads
        self.scale = self.head_dim**-0.5
        self.prefix, self.has_class_token = 1, True
        self.patch_size, self.input_size, self.patches = (8, 8), (32, 32), 16
        self.classes = model.classifier.out_features

    @staticmethod
    def accepts(model):
        return type(model) is ToyViT

    @property
    def blocks(self):
        return list(self.model.blocks)

    @property
    def reads_prefix_only(self):
        return True

    def grid(self, height, width):
        return height // 8, width // 8

    def embed(self, images):
        return self.model.embed(images)

    def norm_attention(self, block, x):
        return self.model.blocks[block].norm1(x)

    def project(self, block, normed, _layout, first=0, last=3):
        module = self.model.blocks[block]
        layers = (module.query, module.key, module.value)[first:last]
        return torch.stack([layer(normed) for layer in layers], 1).unflatten(2, (self.heads, self.head_dim))

    def add_attention(self, block, x, attended, _layout):
        return x + self.model.blocks[block].out(attended)

    def feed_forward(self, block, x, _layout):
        module = self.model.blocks[block]
        return x + module.mlp(module.norm2(x))

    def final_norm(self, x):
        return self.model.norm(x)

    def head(self, x, layout, _size=None):
        return self.model.classifier(self.model.norm(layout.first(x)))

    def costs(self, block):
        module = self.model.blocks[block]
        mlp = module.mlp[0].weight.numel() + module.mlp[2].weight.numel()
        return BlockCosts(self.dim**2, 2 * self.dim**2, self.dim**2, mlp)

    def embed_macs(self):
        return self.model.patches.weight.numel()

    def head_macs(self, rows):
        return rows * 0 + self.model.classifier.weight.numel()

    def native_features(self, images):
        x = self.model.embed(images)
        for block in self.model.blocks:
            x = block(x)
        return self.model.norm(x)

    def preprocessing(self):
        half = [0.5, 0.5, 0.5]
        return {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": half, "std": half, "crop_pct": 1.0}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(backbones, "FAMILIES", (*FAMILIES, ToyBackbone))
    torch.manual_seed(0)
    return ToyViT().eval()


def masked(model, images, stages, table):
    """`drop` by masks: all tokens are computed, pruned ones are hidden as keys."""
    x, history = model.embed(images), kept_agents(table)
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    for index, block in enumerate(model.blocks):
        if index in stages:
            alive[:, 1:] = history[stages.index(index)]
        x = block(x, alive[:, None, None])
    return model.classifier(model.norm(x[:, 0]))


def test_a_family_is_a_class_and_one_line_of_the_registry(toy, monkeypatch):
    assert type(wrap(toy)) is ToyBackbone
    overlapping = ToyViT()
    overlapping.patches.stride = (4, 4)
    with pytest.raises(TokenGameError, match="patches that overlap"):
        wrap(overlapping)
    monkeypatch.setattr(backbones, "FAMILIES", FAMILIES)
    with pytest.raises(TokenGameError, match="ToyViT is of no supported family"):
        wrap(toy)


@pytest.mark.parametrize("stages", [(1, 2), (0, 3)])
@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_contract(transition, stages, toy):
    check_contract(TokenGame(wrap(toy), GameConfig(stages=stages, transition=transition)), IMAGES)


@torch.no_grad()
def test_dropping_equals_masking(toy):
    game = TokenGame(wrap(toy), GameConfig(stages=(1, 2), transition="drop"))
    table = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    found = game.predict(game.play(IMAGES, Scripted(table)))
    torch.testing.assert_close(found, masked(toy, IMAGES, (1, 2), table), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, toy(IMAGES), atol=1e-3)


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_a_pruned_toy(transition, toy):
    config = GameConfig(stages=(1, 2), transition=transition)
    native = toy(IMAGES)
    everything = prune_by(toy, config, keep_all)
    torch.testing.assert_close(everything(IMAGES), native, atol=1e-5, rtol=1e-5)
    fast = prune_by(toy, config, KeepBest(attention, (0.5, 0.25)))
    output = fast.predict(IMAGES)
    assert [number.tolist() for number in output.kept] == [[8] * 3, [4] * 3]
    full, macs = fast.macs(output)
    assert 0 < float(macs.max()) < full
    assert not torch.allclose(output.logits, native, atol=1e-3)
    assert fast.forward_features(IMAGES).shape == (3, 17, 64)
    assert fast.restore() is toy
    in_bfloat16 = copy.deepcopy(everything).bfloat16()(IMAGES.bfloat16()).float()
    assert float((in_bfloat16 - native).norm() / native.norm()) < 0.03


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.inference_mode()
def test_macs_equal_the_flop_counter(transition, toy):
    backbone, config = wrap(toy), GameConfig(stages=(1, 2), transition=transition)
    game = TokenGame(backbone, config, features=False, attention=unfused_attention)
    table = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        toy(IMAGES[:1])
    assert native_macs(backbone, 16) == counter.get_total_flops() / 2
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        state = game.play(IMAGES[:1], Scripted(table))
        game.predict(state)
    assert float(pruned_macs(game, None, torch.stack(state.kept), 16)) == counter.get_total_flops() / 2


@torch.inference_mode()
def test_baselines_run_on_the_toy(toy):
    torch.testing.assert_close(ToMe(toy, (0,) * 4)(IMAGES), toy(IMAGES), atol=1e-5, rtol=1e-5)
    for method in (ToMe(toy, (3, 3, 2, 1)), EViT(toy, 0.5)):
        native, macs = method.macs(method.predict(IMAGES))
        assert 0 < float(macs.max()) < native


def test_images_are_prepared_as_the_family_says(toy):
    image = Image.fromarray(np.full((40, 60, 3), 255, np.uint8))
    tensor = transform_for(preprocessing_of(toy), train=False)(image)
    assert tensor.shape == (3, 32, 32)
    assert torch.allclose(tensor, torch.ones(3, 32, 32))
    assert unfused(toy) is toy, "the family has no other form of attention"
