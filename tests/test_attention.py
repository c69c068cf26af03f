"""Packing helpers and attention kernels against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokengame.attention import KERNELS, bias_column
from tokengame.ops import Layout, keep_at_least_one, segment_mean

counts = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def layout_of(counts):
    return Layout(counts, torch.device("cpu"))


def naive_attention(q, k, v, counts, bias):
    """Softmax written out, image by image and head by head."""
    out, start = torch.zeros_like(q), 0
    for n in counts:
        rows = slice(start, start + n)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head].T / q.shape[2] ** 0.5
            scores = scores if bias is None else scores + bias[rows]
            out[rows, head] = scores.softmax(1) @ v[rows, head]
        start += n
    return out.flatten(1)


@pytest.mark.parametrize("kernel", KERNELS)
@given(counts=counts, biased=st.booleans(), seed=st.integers(0, 99))
def test_kernels_equal_softmax_written_out(kernel, counts, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(counts), 3, 2, 8, generator=generator)
    bias = torch.rand(sum(counts), generator=generator) * 3 if biased else None
    found = KERNELS[kernel](qkv, layout_of(counts), bias)
    torch.testing.assert_close(found, naive_attention(*qkv.unbind(1), counts, bias), atol=1e-5, rtol=1e-5)


@given(counts=counts, seed=st.integers(0, 99))
def test_a_further_column_is_a_key_bias(counts, seed):
    """What variable-length kernels on a GPU are given instead of a bias."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, sum(counts), 2, 8, generator=generator)
    bias = torch.rand(sum(counts), generator=generator) * 3
    wide = bias_column(q, k, v, bias)
    assert all(t.shape == (sum(counts), 2, 16) for t in wide)
    kept_scale = wide[0] * (16 / 8) ** 0.5  # the naive reference divides by the new width's root
    found = naive_attention(kept_scale, *wide[1:], counts, None).view(-1, 2, 16)[..., :8].flatten(1)
    torch.testing.assert_close(found, naive_attention(q, k, v, counts, bias), atol=1e-5, rtol=1e-5)


@given(counts=counts, seed=st.integers(0, 99))
def test_pad_loses_nothing_and_flags_are_counted(counts, seed):
    layout = layout_of(counts)
    rows = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layout.unpad(layout.pad(rows)), rows)
    keep = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed)) < 0.5
    assert layout.per_image(keep) == [int(part.sum()) for part in keep.split(counts)]
    assert torch.equal(layout.image, torch.cat([torch.full((n,), i) for i, n in enumerate(counts)]))


@given(counts=counts, times=st.integers(1, 3))
def test_repeat_puts_each_image_several_times_in_a_row(counts, times):
    rows, layout = layout_of(counts).repeat(times)
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


def test_the_best_agent_of_a_starved_image_stays_and_others_are_left_alone():
    keep = torch.tensor([False, False, False, True, False])
    logits = torch.tensor([-3.0, -1.0, -2.0, 1.0, -5.0])
    assert keep_at_least_one(keep, logits, layout_of([3, 2])).tolist() == [False, True, False, True, False]
