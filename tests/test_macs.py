"""Analytic multiply-accumulates against PyTorch's flop counter and published figures."""

import pytest
import timm
import torch
from conftest import tiny_vit
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

from tokengame.attention import written_attention
from tokengame.backbone import Backbone
from tokengame.config import GameConfig, TrainConfig
from tokengame.game import TokenGame
from tokengame.macs import native_macs, pruned_macs
from tokengame.networks import build_actor
from tokengame.testing import Scripted, survivors


def counted(call) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2


@pytest.fixture
def unfused():
    """The flop counter knows matrix products; fused CPU attention is none."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 3}, {"global_pool": "avg", "class_token": False},
                                     {"global_pool": "map"}, {"name": "deit_tiny_distilled_patch16_224"}])  # fmt: skip
@pytest.mark.usefixtures("unfused")
def test_native_equals_the_flop_counter(changes):
    model = tiny_vit(**changes).requires_grad_(False)
    analytic = native_macs(Backbone(model), 16)
    assert analytic == pytest.approx(counted(lambda: model(torch.randn(1, 3, 32, 32))), rel=1e-6)


@pytest.mark.parametrize(("name", "published"), [("deit_small_patch16_224", 4.6), ("deit_base_patch16_224", 17.6)])
def test_native_equals_the_papers(name, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert native_macs(Backbone(model), 196) / 1e9 == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_pruned_equals_native_blocks_of_shorter_images(transition, model):
    """Each block costs what timm's own block costs on so many rows; halves are told apart by hand.

    The last one goes on with the class token alone.
    """
    backbone = Backbone(model)
    game = TokenGame(backbone, GameConfig(stages=(1, 3), transition=transition), features=False)
    table = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    state = game.play(torch.randn(3, 3, 32, 32), Scripted(table))
    kept = survivors(table).sum(2)
    assert torch.equal(torch.stack(state.kept), kept)
    found = pruned_macs(game, None, kept, 16)
    for image in range(3):
        expected = 16 * 3 * 64 * 32 + 32 * 5
        rows = 17
        for block in range(4):
            after = int(kept[[1, 3].index(block), image]) + 1 if block in (1, 3) else rows
            seen = rows if transition == "merge" else after
            if (block, transition) == (3, "drop"):  # two heads of the class token look at the rows themselves
                expected += 4 * 32 * 32 + 2 * seen * 2 * 32 + 8 * 32 * 32
            else:  # all have keys and values, those who are left ask; in a last block that decides, only one goes on
                going_on = 1 if block == 3 else after
                expected += seen * 2 * 32 * 32 + after * 2 * 32 * 32 + 2 * seen * after * 32 + going_on * 8 * 32 * 32
            rows = after
        if transition == "merge":
            expected += 2 * 32 * 32  # a query of the class token's own at each stage
            expected += (16**2 + int(kept[0, image]) ** 2) * 16  # matching half of the values of two heads of width 16
        assert float(found[image]) == expected


@pytest.mark.parametrize("preset", ["tokengame", "rl4evit"])
@torch.inference_mode()
def test_the_policy_costs_what_the_flop_counter_sees(preset):
    """Within 3 %: what a decision computes once an image (rows of prefix tokens) is left out.

    The context actor's line is multiplied element by element, which the counter does not see.
    """
    model = tiny_vit(img_size=112)
    config = TrainConfig.from_preset(preset).actor
    actor = build_actor(config, {"dim": 32, "heads": 2, "agents": 196, "stages": 1, "transition": "drop"})
    seen = config.observation == "context"
    game = TokenGame(Backbone(model, written_attention), GameConfig(stages=(2,)), features=seen)
    images, table = torch.randn(2, 3, 112, 112), torch.randn(1, 2, 196)
    plain = counted(lambda: game.play(images, Scripted(table)))
    keys = 2 * 196 * 32 if seen else 0  # every agent's keys against the class token's query
    line = 2 * 196 * (2 + 6 + 1) if seen else 0  # two heads, six other features, bias
    with_policy = counted(lambda: game.play(images, lambda obs: actor(obs) * 0 + Scripted(table)(obs)))
    kept = torch.full((1, 2), 90)
    analytic = float((pruned_macs(game, actor, kept, 196) - pruned_macs(game, None, kept, 196)).sum())
    assert analytic == pytest.approx(with_policy - plain + line, rel=0.03)
    assert float((pruned_macs(game, None, kept, 196)).sum()) - keys == pytest.approx(
        float(pruned_macs(TokenGame(game.backbone, game.config, features=False), None, kept, 196).sum())
    )
