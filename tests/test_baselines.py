"""ToMe against its paper: identity, what is conserved, who is merged, and what it costs."""

import pytest
import torch
from conftest import tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from tokengame.attention import padded_attention, written_attention
from tokengame.backbone import Backbone
from tokengame.baselines import ToMe, merge_pairs, tome_at
from tokengame.macs import head_macs, native_macs
from tokengame.testing import _keys

ARCHITECTURES = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "average pool": {"global_pool": "avg", "class_token": False},
    "attention pool": {"global_pool": "map", "class_token": False, "depth": 4},
}


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny_vit(**ARCHITECTURES[request.param])


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_merging_nothing_is_the_native_model(model):
    torch.testing.assert_close(ToMe(model, (0, 0, 0, 0))(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_every_patch_is_in_exactly_one_token(model):
    tome = ToMe(model, (3, 3, 2, 1))
    x, size = tome.merged(IMAGES)
    rows = 16 + tome.backbone.prefix
    assert x.shape[1] == rows - 9
    assert torch.equal(size.sum(1), torch.full((3,), float(rows)))
    assert (size[:, : tome.backbone.prefix] == 1).all()


@torch.inference_mode()
def test_kernels_agree(model):
    one, other = (ToMe(model, (3, 3, 2, 1), kernel)(IMAGES) for kernel in (padded_attention, written_attention))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def merged_slowly(x, size, metric, r, prefix):
    """One image, pair by pair: the paper's steps 1 to 5 (section 3)."""
    patches = list(range(prefix, len(x)))
    first, second = patches[::2], patches[1::2]
    similar = {a: {b: float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in second} for a in first}
    best = {a: max(similar[a], key=similar[a].get) for a in first}
    ranked = sorted(first, key=lambda a: similar[a][best[a]], reverse=True)
    merged = ranked[:r]
    total, mass = x * size[:, None], size.clone()
    for a in merged:
        total[best[a]] += x[a] * size[a]
        mass[best[a]] += size[a]
    left = [*range(prefix), *ranked[r:], *second]
    return mass[left], (total / mass[:, None])[left]


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize(("rows", "r"), [(12, 1), (12, 3), (13, 4), (9, 2)])
def test_the_most_similar_pairs_are_merged(prefix, rows, r):
    generator = torch.Generator().manual_seed(rows)
    x, metric = torch.randn(2, rows, 5, generator=generator), torch.randn(2, rows, 4, generator=generator)
    size = torch.randint(1, 5, (2, rows), generator=generator).float()
    found, found_size = merge_pairs(x, size, metric, r, prefix)
    for image in range(2):
        mass, expected = merged_slowly(x[image], size[image], metric[image], r, prefix)
        as_sets = [sorted(torch.cat([s[:, None], t], 1).tolist()) for s, t in
                   ((mass, expected), (found_size[image], found[image]))]  # fmt: skip
        torch.testing.assert_close(torch.tensor(as_sets[1]), torch.tensor(as_sets[0]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[image, :prefix], x[image, :prefix])


@torch.inference_mode()
def test_a_whole_pass_is_the_papers(model):
    """timm's own attention with log size added to its logits, then merging pair by pair; one image at a time."""
    merges, backbone = (3, 3, 2, 1), Backbone(model)
    found, found_size = ToMe(model, merges).merged(IMAGES)
    for image, x in enumerate(backbone.embed(IMAGES)):
        size = torch.ones(len(x))
        for block, r in zip(backbone.blocks, merges, strict=True):
            keys = _keys(block, x)
            x = x + block.ls1(block.attn(block.norm1(x)[None], attn_mask=size.log().view(1, 1, 1, -1))[0])
            size, x = merged_slowly(x, size, keys, r, backbone.prefix)
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
        as_sets = [sorted(torch.cat([s[:, None], t], 1).tolist()) for s, t in
                   ((size, x), (found_size[image], found[image]))]  # fmt: skip
        torch.testing.assert_close(torch.tensor(as_sets[1]), torch.tensor(as_sets[0]), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_macs_are_what_the_flop_counter_sees(model):
    tome = ToMe(model, (3, 0, 2, 1), written_attention)
    with FlopCounterMode(display=False) as counter:
        x, _ = tome.merged(IMAGES[:1])
    pooled = x.shape[1] - (0 if model.pool_include_prefix else tome.backbone.prefix)
    expected = tome.macs(16) - float(head_macs(model, torch.tensor(float(pooled))))
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.6])
def test_the_budget_is_met(ratio, model):
    native = native_macs(Backbone(model), 16)
    found = tome_at(model, ratio * native, 16).macs(16)
    assert found / native == pytest.approx(ratio, abs=0.04)
