"""ToMe, EViT and ATS against their papers: identity, what is conserved, which tokens are kept, and what it costs."""

import math

import pytest
import torch
from conftest import tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from timm import create_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokengame.backbones import wrap
from tokengame.baselines import reducer
from tokengame.baselines.ats import ATS, sample_by_significance
from tokengame.baselines.evit import EViT
from tokengame.baselines.tome import ToMe, merge_pairs, tome_at
from tokengame.game.testing import _weighted_head
from tokengame.packed.attention import padded_attention, unfused_attention
from tokengame.runtime.macs import native_macs

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
def test_merging_nothing_gives_the_native_prediction(model):
    torch.testing.assert_close(ToMe(model, (0, 0, 0, 0))(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)


def merged(tome, images=IMAGES):
    """Rows [B, n, C] before the head, and how many patches each stands for."""
    ends = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducer, "predict", lambda _backend, _half, *rows: ends.append(rows))
        tome.predict(images)
    ((x, layout, _, size),) = ends
    shape = layout.images, layout.longest
    return x.view(*shape, -1), size.view(shape)


@torch.inference_mode()
def test_every_patch_is_in_exactly_one_token(model):
    tome = ToMe(model, (3, 3, 2, 1))
    x, size = merged(tome)
    rows = 16 + tome.backbone.prefix
    assert x.shape[1] == rows - 9
    assert torch.equal(size.sum(1), torch.full((3,), float(rows)))
    assert (size[:, : tome.backbone.prefix] == 1).all()


@torch.inference_mode()
def test_kernels_agree(model):
    one, other = (ToMe(model, (3, 3, 2, 1), kernel)(IMAGES) for kernel in (padded_attention, unfused_attention))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def mean_keys(block, x):
    """[n, D] keys averaged over heads."""
    attn = block.attn
    keys = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, attn.head_dim)[:, 1]
    return attn.k_norm(keys).mean(1)


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
    found, found_size, kept, place = merge_pairs(x, size, metric, r, prefix)
    for image in range(2):
        mass, expected = merged_slowly(x[image], size[image], metric[image], r, prefix)
        as_sets = [sorted(torch.cat([s[:, None], t], 1).tolist()) for s, t in
                   ((mass, expected), (found_size[image], found[image]))]  # fmt: skip
        torch.testing.assert_close(torch.tensor(as_sets[1]), torch.tensor(as_sets[0]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[image, :prefix], x[image, :prefix])
        total = torch.zeros(rows - r, 5).index_add(0, place[image], x[image] * size[image, :, None])
        torch.testing.assert_close(total / found_size[image, :, None], found[image], atol=1e-5, rtol=1e-5)
        assert torch.equal(place[image, kept[image]], torch.arange(rows - r)), "rows that stay are in their own"


@torch.inference_mode()
def test_tome_is_that_of_the_paper(model):
    """One image at a time: timm's own attention with log size added to its logits, then merging pair by pair."""
    merges, backbone = (3, 3, 2, 1), wrap(model)
    found = ToMe(model, merges)(IMAGES)
    for image, x in enumerate(backbone.embed(IMAGES)):
        size = torch.ones(len(x))
        for block, r in zip(backbone.blocks, merges, strict=True):
            keys = mean_keys(block, x)
            x = x + block.ls1(block.attn(block.norm1(x)[None], attn_mask=size.log().view(1, 1, 1, -1))[0])
            size, x = merged_slowly(x, size, keys, r, backbone.prefix)
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
        expected = _weighted_head(backbone, model.norm(x), size)
        torch.testing.assert_close(found[image], expected, atol=1e-4, rtol=1e-4)


def counted(method, image):
    """Multiply-accumulates up to the head: those that PyTorch counts, and those of the formula."""
    backbone = method.backbone
    backbone.head = lambda x, layout, _size=None: x.new_zeros(layout.images, 5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = method.predict(image)
    head = backbone.head_macs(output.counts[-1].double())
    return counter.get_total_flops() / 2, float(method.macs(output)[1] - head)


@pytest.mark.parametrize("merges", [(3, 0, 2, 1), (3, 0, 2, 0)])
@torch.inference_mode()
def test_macs_equal_the_flop_counter(merges, model):
    tome = ToMe(model, merges, unfused_attention)
    found, expected = counted(tome, IMAGES[:1])
    assert found == pytest.approx(expected, rel=1e-6)
    assert float(tome.macs(tome.predict(IMAGES[:1]))[1]) == pytest.approx(tome.macs_at(16))


@pytest.mark.parametrize("ratio", [0.8, 0.7, 0.6])
def test_tome_at_meets_the_budget(ratio, model):
    native = native_macs(wrap(model), 16)
    found = tome_at(model, ratio * native, 16).macs_at(16)
    assert found / native == pytest.approx(ratio, abs=0.04)


def class_attention(block, x, prefix):
    """[H, n] of the class token to all rows of one image, and values; without a class token, of the mean query."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    query = q[:, :1] if prefix else q.mean(1, keepdim=True)
    return (query @ k.transpose(1, 2) * attn.head_dim**-0.5).softmax(2)[:, 0], v


@pytest.mark.parametrize("fuse", [True, False])
@torch.inference_mode()
def test_evit_is_that_of_the_paper(fuse, model):
    """One image at a time: after the attention the most attended are kept, the others become a weighted sum."""
    evit = EViT(model, 0.6, blocks=(1, 2), fuse=fuse)
    backbone, found = evit.backbone, evit(IMAGES)
    for image, x in enumerate(backbone.embed(IMAGES)):
        for index, block in enumerate(backbone.blocks):
            attention = class_attention(block, x, backbone.model.has_class_token)[0].mean(0)
            x = x + block.ls1(block.attn(block.norm1(x)[None])[0])
            if index in (1, 2):
                patches = range(backbone.prefix, len(x))
                ranked = sorted(patches, key=lambda p: -float(attention[p]))
                number = math.ceil(0.6 * len(patches))
                fused = sum(attention[p] * x[p] for p in ranked[number:])
                kept = [*range(backbone.prefix), *sorted(ranked[:number])]
                x = torch.cat([x[kept], fused[None]]) if fuse else x[kept]
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
        expected = backbone.model.forward_head(backbone.model.norm(x)[None])[0]
        torch.testing.assert_close(found[image], expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_evit_that_keeps_all_gives_the_native_prediction(model):
    torch.testing.assert_close(EViT(model, 1.0)(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_evit_keeps_the_numbers_of_the_paper():
    """DeiT-S at keep 0.7: 3.0 of 4.6 GMACs in the paper's Table 1, of which the last block computes no patches here."""
    evit = EViT(create_model("deit_small_patch16_224"), 0.7)
    assert evit.blocks == (3, 6, 9)
    output = evit.predict(torch.randn(1, 3, 224, 224))
    assert [int(n) for n in output.kept] == [139, 99, 71]  # ceil(0.7 n) and the fused one
    evit.end = 2 * 12  # as published
    assert float(evit.macs(output)[1]) / 1e9 == pytest.approx(3.0, abs=0.05)


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12).filter(lambda v: sum(v) > 0.1),
    samples=st.integers(1, 15),
)
def test_ats_inverts_the_distribution(values, samples):
    """Against a walk along the distribution, point by point."""
    hits, total = set(), sum(values)
    for k in range(1, samples + 1):
        point, mass = (2 * k - 1) / (2 * samples) * total, 0.0
        distances = []
        for index, value in enumerate(values):
            mass += value
            distances.append(abs(mass - point))
            if mass >= point:
                hits.add(index)
                break
        if min(distances) < 1e-9:
            return  # a tie that rounding may break either way
    found = sample_by_significance(torch.tensor([values]), samples)[0]
    assert set(found.nonzero().flatten().tolist()) == hits
    assert 1 <= len(hits) <= samples


@torch.inference_mode()
def test_ats_is_that_of_the_paper(model):
    ats = ATS(model, samples=12, blocks=(1, 2))
    backbone, found = ats.backbone, ats(IMAGES)
    assert int(ats.predict(IMAGES).kept[-1].min()) < 12, "some patch was hit twice"
    for image, x in enumerate(backbone.embed(IMAGES)):
        for index, block in enumerate(backbone.blocks):
            attention, values = class_attention(block, x, backbone.model.has_class_token)
            x = x + block.ls1(block.attn(block.norm1(x)[None])[0])
            if index in (1, 2):
                significance = (attention * values.norm(dim=2)).sum(0)[backbone.prefix :]
                kept = sample_by_significance(significance[None], 12)[0].nonzero().flatten() + backbone.prefix
                x = x[[*range(backbone.prefix), *kept.tolist()]]
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
        expected = backbone.model.forward_head(backbone.model.norm(x)[None])[0]
        torch.testing.assert_close(found[image], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "setting"), [(EViT, 0.5), (ATS, 6)])
@torch.inference_mode()
def test_macs_of_single_images(kind, setting, model):
    method = kind(model, setting)
    method.attend = unfused_attention
    for image in IMAGES.split(1):
        found, expected = counted(method, image)
        # the counter does not count the class token's attention that ranks the rows: it is no matrix product
        ranking = sum(int(rows) for rows in method.predict(image).counts[:-1]) * method.backbone.dim
        assert found + ranking == pytest.approx(expected, rel=1e-6)
