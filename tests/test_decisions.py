"""Decisions on the compiled kernels against float32 and loops in double precision."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import layout_of, needs_kernels, normal
from hypothesis import given
from hypothesis import strategies as st

from tokengame.backends import CompiledDecisions, TorchBackend
from tokengame.game import State
from tokengame.game.state import ordered_dither
from tokengame.packed.attention import deterministic_attention
from tokengame.packed.heads import Heads, ObservationRequest

pytestmark = needs_kernels
both_levels = pytest.mark.usefixtures("level")
COMPILED, PYTORCH = (
    backend(SimpleNamespace(dim=96), deterministic_attention) for backend in (CompiledDecisions, TorchBackend)
)

some_agents = st.lists(st.sampled_from([1, 16, 33]) | st.integers(1, 70), min_size=1, max_size=4)
a_state = {"counts": some_agents | st.integers(2, 40).map(lambda n: [n, n]), "prefix": st.integers(1, 2),
           "heads": st.integers(1, 3), "width": st.sampled_from([32, 64]), "sized": st.booleans(),
           "seed": st.integers(0, 99)}  # fmt: skip


def before_a_decision(counts, prefix, heads, width, sized, seed):
    """Random rows; of 70 agents of each image `counts` are left. Keys and values are parts of one tensor."""
    layout, generator = layout_of([prefix + n for n in counts]), torch.Generator().manual_seed(seed)
    q, k, v = normal(layout.rows, 3, heads, width, seed=seed).unbind(1)
    left = [torch.randperm(70, generator=generator)[:n].sort().values for n in counts]
    position = torch.cat([part for own in left for part in (torch.full((prefix,), -1), own)])
    size = torch.randint(1, 6, (layout.rows,), generator=generator).float() if sized else None
    x = normal(layout.rows, 96, seed=seed + 1) * torch.rand(layout.rows, 1, generator=generator).bfloat16()
    dither, own = ordered_dither(7, 10), Heads(layout.first(q), k, v, width**-0.5)
    return State(COMPILED, x, position, layout, layout_of(counts), 70, dither, size, own)


def observe(backend, state, heads, similarity=True):
    """What a backend lets agents observe of an attention of `heads`."""
    agents, prefix = state.agents, state.prefix
    request = ObservationRequest(state.position, agents, state.dither, state.total, prefix, True, similarity)
    return backend.observe(heads, state.layout, state.bias, request)


@both_levels
@given(**a_state)
@torch.no_grad()
def test_features_are_those_of_float32(heads, **random):
    state = before_a_decision(heads=heads, **random)
    own, agents = state.heads, state.agents
    exact = observe(PYTORCH, state, Heads(own.query.float(), own.keys.float(), own.values.float(), own.scale))
    compiled = observe(COMPILED, state, own)
    assert compiled.similarity is None, "the kernels keep no similarity"
    for name in ("agent", "image", "row"):
        assert torch.equal(getattr(compiled, name), getattr(exact, name))
    expected, found, alike = exact.features, compiled.features, exact.similarity
    for columns, most in ((range(heads + 2), 1e-3), ([heads + 2], 5e-3), ([heads + 3], 1e-6), ([heads + 5], 0)):
        assert float((found - expected)[:, columns].abs().max()) <= most
    centred = agents.pad(expected[:, heads])
    ahead = centred[:, None] - centred[:, :, None]  # an agent that gets hardly more attention may count or not
    least, most = (agents.unpad(alike.where(ahead > hair, -1).amax(2).clamp(min=-1)) for hair in (1e-3, -1e-3))
    assert ((found[:, heads + 4] > least - 5e-3) & (found[:, heads + 4] < most + 5e-3)).all()
    found[:, [heads + 2, heads + 4]] = 0
    assert torch.equal(observe(COMPILED, state, own, similarity=False).features, found)


@both_levels
@given(**a_state, share=st.sampled_from([0.0, 0.2, 0.9, 1.0]))
@torch.no_grad()
def test_merging_equals_loops_in_double_precision_and_no_patch_is_lost(share, seed, **random):
    state = before_a_decision(**random, seed=seed)
    keep = torch.rand(state.agents.rows, generator=torch.Generator().manual_seed(seed)) < share
    keep[state.agents.start + state.agents.count // 2] = True
    left = layout_of([n + state.prefix for n in state.agents.per_image(keep)])
    found, row, groups, first = COMPILED.merge(state, keep, left), state.agent_rows.tolist(), [], 0
    x, values = state.x.double(), state.heads.values[..., : random["width"] // 2].flatten(1).double()
    size = torch.ones(len(x)) if state.size is None else state.size
    for count in state.agents.counts:
        own = range(first, first + count)
        kept = [agent for agent in own if keep[agent]]
        merged = {agent: [row[agent]] for agent in kept}
        for agent in own:
            chosen = int(found.absorber[agent])
            assert chosen in (kept if agent not in kept else [agent])
            if agent not in kept:
                alike = F.cosine_similarity(values[row[agent]], values[[row[k] for k in kept]])
                assert alike[kept.index(chosen)] > alike.max() - 2e-3, "the most similar, but for rounding"
                merged[chosen].append(row[agent])
        groups += [[row[own[0]] - state.prefix + place] for place in range(state.prefix)] + list(merged.values())
        first += count
    assert torch.equal(found.position, state.position[[rows[0] for rows in groups]])
    assert found.size.tolist() == [float(size[rows].sum()) for rows in groups]
    for after, before in zip(found.size.split(left.counts), size.split(state.layout.counts), strict=True):
        assert after.sum() == before.sum()
    for after, rows in zip(found.x, groups, strict=True):
        expected = F.normalize((x[rows] * size[rows, None]).sum(0), dim=0) * x[rows].norm(dim=1).max()
        torch.testing.assert_close(after.double(), expected, atol=1e-5, rtol=2**-8)
        assert len(rows) > 1 or torch.equal(after, state.x[rows[0]]), "a token that absorbs no other does not change"
