"""Analytic multiply-accumulates against PyTorch's flop counter and published figures."""

import pytest
import timm
import torch
from conftest import tiny_vit
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

from tokengame.backbones import wrap
from tokengame.config import GameConfig, TrainConfig
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, kept_agents
from tokengame.packed.attention import unfused_attention
from tokengame.policies.networks import build_actor
from tokengame.runtime.macs import native_macs, pruned_macs


def counted(call) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2


@pytest.fixture
def unfused():
    """The flop counter counts matrix products, and fused attention on CPUs is none."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 3}, {"global_pool": "avg", "class_token": False},
                                     {"global_pool": "map"}, {"name": "deit_tiny_distilled_patch16_224"}])  # fmt: skip
@pytest.mark.usefixtures("unfused")
def test_native_equals_the_flop_counter(changes):
    model = tiny_vit(**changes).requires_grad_(False)
    analytic = native_macs(wrap(model), 16)
    assert analytic == pytest.approx(counted(lambda: model(torch.randn(1, 3, 32, 32))), rel=1e-6)


@pytest.mark.parametrize(("name", "published"), [("deit_small_patch16_224", 4.6), ("deit_base_patch16_224", 17.6)])
def test_native_equals_the_papers(name, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert native_macs(wrap(model), 196) / 1e9 == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_pruned_equals_native_blocks_of_shorter_images(transition, model):
    """Each block costs what timm's own block costs on as many rows; attention and MLP are counted by hand.

    The last block computes the class token alone.
    """
    backbone = wrap(model)
    game = TokenGame(backbone, GameConfig(stages=(1, 3), transition=transition), features=False)
    table = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    state = game.play(torch.randn(3, 3, 32, 32), Scripted(table))
    kept = kept_agents(table).sum(2)
    assert torch.equal(torch.stack(state.kept), kept)
    found = pruned_macs(game, None, kept, 16)
    for image in range(3):
        expected = 16 * 3 * 64 * 32 + 32 * 5
        rows = 17
        for block in range(4):
            after = int(kept[[1, 3].index(block), image]) + 1 if block in (1, 3) else rows
            keys = rows if transition == "merge" else after
            if (block, transition) == (3, "drop"):  # two heads of the class token attend to the rows themselves
                expected += 4 * 32 * 32 + 2 * keys * 2 * 32 + 8 * 32 * 32
            else:  # all have keys and values, kept ones a query; the MLP of the last block has the class token alone
                in_mlp = 1 if block == 3 else after
                expected += keys * 2 * 32 * 32 + after * 2 * 32 * 32 + 2 * keys * after * 32 + in_mlp * 8 * 32 * 32
            rows = after
        if transition == "merge":
            expected += 2 * 32 * 32  # a query of the class token's own at each stage
            expected += (16**2 + int(kept[0, image]) ** 2) * 16  # matching half of the values of two heads of width 16
        assert float(found[image]) == expected


@pytest.mark.parametrize("preset", ["tokengame", "rl4evit"])
@torch.inference_mode()
def test_macs_of_the_policy_equal_the_flop_counter(preset):
    """Within 3 %: what a decision computes once an image (rows of prefix tokens) is left out.

    The context actor multiplies element by element, which the counter does not count.
    """
    model = tiny_vit(img_size=112)
    config = TrainConfig.from_preset(preset).actor
    actor = build_actor(config, {"dim": 32, "heads": 2, "agents": 196, "stages": 1, "transition": "drop"})
    features = config.observation == "context"
    game = TokenGame(wrap(model), GameConfig(stages=(2,)), features, unfused_attention)
    images, table = torch.randn(2, 3, 112, 112), torch.randn(1, 2, 196)
    plain = counted(lambda: game.play(images, Scripted(table)))
    keys = 2 * 196 * 32 if features else 0  # each agent's key times the class token's query
    linear = 2 * 196 * (2 + 6 + 1) if features else 0  # two heads, six other features, bias
    with_policy = counted(lambda: game.play(images, lambda obs: actor(obs) * 0 + Scripted(table)(obs)))
    kept = torch.full((1, 2), 90)
    analytic = float((pruned_macs(game, actor, kept, 196) - pruned_macs(game, None, kept, 196)).sum())
    assert analytic == pytest.approx(with_policy - plain + linear, rel=0.03)
    assert float((pruned_macs(game, None, kept, 196)).sum()) - keys == pytest.approx(
        float(pruned_macs(TokenGame(game.backbone, game.config, features=False), None, kept, 196).sum())
    )
