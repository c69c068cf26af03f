"""What must hold for every model of every family, checked with random weights and decisions."""

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokengame.backbones import wrap
from tokengame.baselines.heuristics import keep_all
from tokengame.config import GameConfig
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, check_contract, masked_features, merged_by_loops, played_features
from tokengame.packed.attention import unfused_attention
from tokengame.runtime import prune_by
from tokengame.runtime.macs import native_macs, pruned_macs

STAGES = (1, 2)


def distance(found, expected):
    """How far off, as a share."""
    return float((found - expected).norm() / expected.norm())


def games(backbone):
    """One game a transition, that computes all patches to the end."""
    return {
        kind: TokenGame(backbone, GameConfig(STAGES, transition=kind), keep_patches=True) for kind in ("drop", "merge")
    }


@torch.no_grad()
def check_all_tokens(model, images):
    """With every token kept, prediction, features and call are the native ones."""
    backbone = wrap(model)
    for kind in ("drop", "merge"):
        fast = prune_by(model, GameConfig(STAGES, transition=kind), keep_all)
        assert distance(fast.predict(images).logits, backbone.native(images)) < 1e-5
        assert distance(fast.forward_features(images), backbone.native_features(images)) < 1e-5
        torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=1e-4)
        check_contract(fast.game, images)


@torch.no_grad()
def check_random_decisions(model, images):
    """Packed equals masked (drop), and one token after the other (merge); the decisions matter."""
    backbone = wrap(model)
    played, native = games(backbone), backbone.native(images)
    agents = played["drop"].reset(images).total
    table = torch.randn(len(STAGES), len(images), agents, generator=torch.Generator().manual_seed(2)) + 0.5
    found, left = played_features(played["drop"], images, table)
    assert not left.all()
    assert distance(found[left], masked_features(backbone, STAGES, images, table)[left]) < 1e-5
    for kind, game in played.items():
        shorter = TokenGame(backbone, game.config)  # patches may leave before the last block
        predicted = shorter.predict(shorter.play(images, Scripted(table)))
        assert distance(predicted, game.predict(game.play(images, Scripted(table)))) < 1e-5
        assert distance(predicted, native) > 1e-4, "the decisions changed nothing"
        if kind == "merge":
            assert distance(predicted, merged_by_loops(backbone, STAGES, images, table)) < 1e-5


@torch.no_grad()
def check_bfloat16(model, images):
    """All tokens in bfloat16 is about as near the native float32 prediction as the native model in bfloat16 is."""
    exact, half = wrap(model).native(images), copy.deepcopy(model).bfloat16()
    fast, images = prune_by(half, GameConfig(STAGES), keep_all), images.bfloat16()
    native = wrap(half).native(images)
    found = fast.predict(images).logits
    assert found.dtype == native.dtype == torch.bfloat16
    assert distance(found.float(), exact) < max(0.01, 2 * distance(native.float(), exact))
    return fast


def check_gradients(model, images):
    """Training mode, without dropout in the model, gives the native gradients."""
    fast = prune_by(model, GameConfig(STAGES), keep_all).train()
    fast.predict(images).logits.square().sum().backward()
    native = copy.deepcopy(model).train()
    wrap(native).native(images).square().sum().backward()
    wanted = {name: p.grad for name, p in native.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in fast.model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        # a key's bias has no gradient but rounding: it cancels in the softmax
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-5, name


def check_macs(model, image, mean=False):
    """Multiply-accumulates of image [1, ...], natively and pruned, are those that PyTorch counts.

    A `mean` over packed rows is a product; natively it is a sum, which is not counted.
    """
    backbone = wrap(model)
    agents = TokenGame(backbone, GameConfig(STAGES)).reset(image).total
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert native_macs(backbone, agents) == counter.get_total_flops() / 2
    table = torch.randn(len(STAGES), 1, agents, generator=torch.Generator().manual_seed(2))
    for kind in ("drop", "merge"):
        game = TokenGame(backbone, GameConfig(STAGES, transition=kind), features=False, attention=unfused_attention)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            state = game.play(image, Scripted(table))
            game.predict(state)
        spare = state.x.numel() if mean else 0
        assert float(pruned_macs(game, None, torch.stack(state.kept), agents)) == counter.get_total_flops() / 2 - spare
