"""Packing helpers and attention kernels against plain loops."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import varlen

from tokengame.game.transition import keep_at_least_one
from tokengame.packed import attention
from tokengame.packed.attention import (
    KERNELS,
    LONG,
    Shape,
    batch_cost,
    bias_column,
    by_cost,
    by_rule,
    cross_attention,
    grouped_attention,
    image_cost,
    looped_attention,
    padded_attention,
    unfused_attention,
    varlen_attention,
)
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import PIECE, add_in_pieces, padding_rows, segment_mean

counts = st.lists(st.integers(1, 9), min_size=1, max_size=10)


def layout_of(counts):
    return RaggedLayout(counts, torch.device("cpu"))


def naive_attention(q, k, v, counts, bias, queries=None, scale=None):
    """A softmax image by image and head by head; `queries` of each image, where not all rows have one."""
    out, first, start = torch.zeros_like(q), 0, 0
    for few, n in zip(queries or counts, counts, strict=True):
        own, rows = slice(first, first + few), slice(start, start + n)
        for head in range(q.shape[1]):
            scores = q[own, head] @ k[rows, head].T * (scale or q.shape[2] ** -0.5)
            scores = scores if bias is None else scores + bias[rows]
            out[own, head] = scores.softmax(1) @ v[rows, head]
        first, start = first + few, start + n
    return out.flatten(1)


@pytest.mark.parametrize("kernel", KERNELS)
@given(counts=counts, biased=st.booleans(), seed=st.integers(0, 99))
def test_kernels_equal_the_naive_softmax(kernel, counts, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(counts), 3, 2, 8, generator=generator)
    bias = torch.rand(sum(counts), generator=generator) * 3 if biased else None
    found = KERNELS[kernel].kernel(qkv, layout_of(counts), bias)
    torch.testing.assert_close(found, naive_attention(*qkv.unbind(1), counts, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [looped_attention, unfused_attention])
def test_gradients_equal_the_naive_ones_and_none_is_longer_than_its_image(kernel):
    counts, generator = [3, 7, 1], torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(counts), 3, 2, 8, generator=generator, requires_grad=True)
    bias = torch.rand(sum(counts), generator=generator)
    found = kernel(qkv, layout_of(counts), bias)
    nodes = [found.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None and before not in nodes]
    assert not any(node.name().startswith("SliceBackward") for node in nodes), "such a gradient is as long as the batch"
    (gradient,) = torch.autograd.grad(found.sin().sum(), qkv)
    (expected,) = torch.autograd.grad(naive_attention(*qkv.unbind(1), counts, bias).sin().sum(), qkv)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@given(pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=10), even=st.booleans(),
       biased=st.booleans(), scale=st.sampled_from([None, 0.7]), seed=st.integers(0, 99))  # fmt: skip
def test_cross_attention_of_fewer_queries_than_keys(pairs, even, biased, scale, seed):
    queries = [3 if even else few for few, _ in pairs]
    counts = [few + more for few, (_, more) in zip(queries, pairs, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(queries), 2, 8, generator=generator)
    k, v = torch.randn(2, sum(counts), 2, 8, generator=generator)
    bias = torch.rand(sum(counts), generator=generator) * 3 if biased else None
    found = cross_attention(q, k, v, layout_of(queries), layout_of(counts), bias, scale)
    assert found.shape == q.shape
    expected = naive_attention(q, k, v, counts, bias, queries, scale)
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-5, rtol=1e-5)


@given(counts=counts, seed=st.integers(0, 99))
def test_bias_column_acts_as_a_key_bias(counts, seed):
    """Variable-length kernels on a GPU get the column instead of a bias."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, sum(counts), 2, 8, generator=generator)
    bias = torch.rand(sum(counts), generator=generator) * 3
    wide = bias_column(q, k, v, bias)
    assert all(t.shape == (sum(counts), 2, 16) for t in wide)
    kept_scale = wide[0] * (16 / 8) ** 0.5  # the naive reference divides by the root of the new width
    found = naive_attention(kept_scale, *wide[1:], counts, None).view(-1, 2, 16)[..., :8].flatten(1)
    torch.testing.assert_close(found, naive_attention(q, k, v, counts, bias), atol=1e-5, rtol=1e-5)


@given(counts=counts, seed=st.integers(0, 99))
def test_unpad_inverts_pad_and_flags_are_counted_per_image(counts, seed):
    layout = layout_of(counts)
    rows = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layout.unpad(layout.pad(rows)), rows)
    keep = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed)) < 0.5
    assert layout.per_image(keep) == [int(part.sum()) for part in keep.split(counts)]
    assert torch.equal(layout.image, torch.cat([torch.full((n,), i) for i, n in enumerate(counts)]))


@given(counts=counts, times=st.integers(1, 3))
def test_repeat_puts_each_image_several_times_in_a_row(counts, times):
    rows, layout = layout_of(counts).take(torch.arange(len(counts)).repeat_interleave(times))
    expected = [part for part in torch.arange(sum(counts)).split(counts) for _ in range(times)]
    assert rows.tolist() == torch.cat(expected).tolist()
    assert layout.counts == [n for n in counts for _ in range(times)]


def test_segment_mean_by_hand():
    values = torch.tensor([[1.0], [3.0], [10.0]])
    assert segment_mean(values, layout_of([2, 1])).tolist() == [[2.0], [10.0]]
    assert segment_mean(values, layout_of([2, 1]), torch.tensor([3.0, 1.0, 5.0])).tolist() == [[1.5], [10.0]]


def test_segment_mean_counts_beyond_256_in_bfloat16():
    values = torch.ones(700, 1, dtype=torch.bfloat16)
    assert segment_mean(values, layout_of([600, 100])).tolist() == [[1.0], [1.0]]


def test_an_image_without_agents_keeps_its_best_and_others_are_unchanged():
    keep = torch.tensor([False, False, False, True, False])
    logits = torch.tensor([-3.0, -1.0, -2.0, 1.0, -5.0])
    assert keep_at_least_one(keep, logits, layout_of([3, 2])).tolist() == [False, True, False, True, False]


def by_softmax(q, k, v, ends_q, ends_k, longest_q, longest_k, scale):
    """What `varlen_attn` documents, slowly; the kernel itself runs only on GPUs."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert longest_q == longest_k == int(ends_q.diff().max())
    parts = []
    for first, last in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        one_q, one_k, one_v = (t[first:last].transpose(0, 1) for t in (q, k, v))
        parts.append(((one_q @ one_k.transpose(1, 2) * scale).softmax(2) @ one_v).transpose(0, 1))
    return torch.cat(parts)


@given(counts=counts, biased=st.booleans(), seed=st.integers(0, 99))
def test_arguments_of_the_gpu_kernel(counts, biased, seed):
    def stand_in(*args, **settings):
        bound = signature.bind(*args, **settings).arguments
        return by_softmax(*list(bound.values())[:7], scale=bound["scale"])

    signature = inspect.signature(varlen.varlen_attn)
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(counts), 3, 2, 8, generator=generator)
    bias = torch.rand(sum(counts), generator=generator) * 3 if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", stand_in)
        found = varlen_attention(qkv, layout_of(counts), bias)
    torch.testing.assert_close(found, naive_attention(*qkv.unbind(1), counts, bias), atol=1e-5, rtol=1e-5)


def test_half_precision_kernels_are_near_double_precision():
    qkv = torch.randn(90, 3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.rand(90, generator=torch.Generator().manual_seed(1)) * 3
    exact = naive_attention(*qkv.double().unbind(1), [40, 20, 30], bias.double())
    for name, option in KERNELS.items():
        found = option.kernel(qkv, layout_of([40, 20, 30]), bias)
        assert found.dtype == torch.bfloat16
        assert float((found - exact).norm() / exact.norm()) < 0.01, name


CPU = Shape(torch.device("cpu"), torch.float32, 2, 8, threads=99)


def test_choice_by_cost(monkeypatch):
    """By hand: groups cost as much as their longest image, padding is for equal lengths, the cheapest kernel wins."""
    costs = {
        "padded": 0.5,
        "looped": 1.0,
        "unfused": 1.0,
        "grouped by 2": 0.8,
        "grouped by 4": 0.7,
        "grouped by 8": 9.0,
    }
    monkeypatch.setattr(attention, "measured_cost", lambda name, length, _: costs[name] * length)
    attention._cheapest.cache_clear()
    assert batch_cost("grouped by 2", (16, 32, 64), CPU) == pytest.approx(0.8 * (32 + 32 + 64))
    assert image_cost("looped", 27, CPU) == pytest.approx(27)  # measured at 23 and 32
    chosen = {counts: by_cost(layout_of(counts), CPU) for counts in [(32,) * 4, (30, 31, 32, 32), (16, 64), (16,)]}
    assert chosen[(32,) * 4] is KERNELS["padded"].kernel
    assert chosen[30, 31, 32, 32] is KERNELS["grouped by 4"].kernel
    assert chosen[16, 64] is KERNELS["looped"].kernel  # 80 against 0.8 * 128
    assert chosen[16,] is KERNELS["looped"].kernel
    attention._cheapest.cache_clear()


def test_choice_by_rule(monkeypatch):
    monkeypatch.setattr(attention, "has_varlen", lambda device, head_dim: device.type == "cuda" and head_dim == 8)
    gpu = CPU._replace(device=torch.device("cuda"))
    assert by_rule(layout_of([9, 9]), gpu) is padded_attention
    assert by_rule(layout_of([9, 5]), gpu) is padded_attention  # float32 has no variable-length kernel
    assert by_rule(layout_of([9, 5]), gpu._replace(dtype=torch.bfloat16)) is varlen_attention
    assert by_cost(layout_of([9, 5]), gpu._replace(dtype=torch.float16)) is varlen_attention
    assert by_rule(layout_of([200, 150]), CPU) is looped_attention
    assert by_rule(layout_of([9, 5]), CPU).func is grouped_attention
    assert by_rule(layout_of([9, 5]), CPU, gradients=True) is looped_attention


def test_long_images_use_only_fused_kernels(monkeypatch):
    monkeypatch.setattr(attention, "measured_cost", lambda name, length, _: (name == "looped") * length)
    attention._cheapest.cache_clear()
    assert by_cost(layout_of([LONG, LONG - 1]), CPU) is KERNELS["unfused"].kernel
    assert by_cost(layout_of([LONG + 1, LONG]), CPU) is looped_attention
    attention._cheapest.cache_clear()


@pytest.mark.parametrize("rows", [31, 32, 1000])
def test_half_precision_batches_are_padded_to_a_multiple_of_32(rows):
    with torch.no_grad():
        assert (rows + padding_rows(torch.zeros(rows, 2, dtype=torch.bfloat16))) % 32 == 0
        assert padding_rows(torch.zeros(rows, 2)) == 0
    assert padding_rows(torch.zeros(rows, 2, dtype=torch.bfloat16)) == 0, "not where gradients are recorded"


def test_add_in_pieces_equals_one_call():
    piece = PIECE // 300
    rows, calls = torch.randn(5 * piece + 7, 300), []

    def double(some):
        calls.append(len(some))
        return 2 * some

    with torch.no_grad():
        assert torch.equal(add_in_pieces(double, rows), rows + 2 * rows)
        assert set(calls[:-1]) == {piece}, "few shapes, since each new one costs time once"
        assert sum(calls) == len(rows)
        calls.clear()
        add_in_pieces(double, rows[: 2 * piece - 1])
    add_in_pieces(double, rows)
    assert calls == [2 * piece - 1, len(rows)], "few rows, and rows with gradients, in one piece"
