"""Attention over a pack on the CPU against a dense mask: trees, paths, padding, context-parallel shares."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import grow
from treepo_mega.actor import attention_cpu
from treepo_mega.actor.attention import PACKS, PackLayout, PackRegistry
from treepo_mega.actor.attention_cpu import CpuLayout, attend
from treepo_mega.tree.credit import Credit
from treepo_mega.tree.pack import Batch, plan_step
from treepo_mega.tree.segments import Segments


def pack_of(trees, multiple=1, cp_size=1, cp_rank=0):
    s = Segments.from_trees(trees, range(len(trees)))
    nothing = np.zeros(len(s))
    credit = Credit(nothing, nothing, nothing, s.leaf_hi - s.leaf_lo)
    plan = plan_step(
        Batch(s, credit), dp_size=1, dp_rank=0, max_tokens=1 << 20, multiple=multiple, cp_size=cp_size, cp_rank=cp_rank
    )
    return plan.packs[0]


@st.composite
def forests(draw):
    rng, ids = random.Random(draw(st.integers(0, 1 << 30))), itertools.count()
    longest = draw(st.sampled_from([2, 8, 40]))
    return [
        grow(
            rng, nodes=draw(st.integers(1, 12)), max_segment=longest, prompt=rng.randint(1, longest), name="p", ids=ids
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


def dense(query, key, value, pack, scale):
    """One mask of all pairs and plain softmax attention; padding gets 0."""
    real = pack.blocks[-1][1]
    i = torch.arange(len(pack.tokens)) if pack.local is None else torch.from_numpy(pack.local)
    j = torch.arange(real)
    visible = (j[None] <= i[:, None]) & (i[:, None] < torch.from_numpy(pack.subtree_end[:real])[None])
    share = query.shape[1] // key.shape[1]
    k, v = (t[:real].repeat_interleave(share, 1) for t in (key, value))
    scores = torch.einsum("thd,shd->hts", query, k) * (scale or query.shape[-1] ** -0.5)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v)


def inputs(pack, heads=4, groups=2, size=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(len(pack.tokens))
    queries = len(pack.tokens) if pack.local is None else len(pack.local)
    shapes = ((queries, heads), (len(pack.tokens), groups), (len(pack.tokens), groups))
    return [torch.randn(n, h, size, generator=g, dtype=dtype, requires_grad=True) for n, h in shapes]


def check_equal(pack, layout, scale, **shape):
    leaves = inputs(pack, **shape)
    got, want = attend(*leaves, layout, scale), dense(*leaves, pack, scale)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[
        (torch.arange(len(weight)) if pack.local is None else torch.from_numpy(pack.local)) >= pack.blocks[-1][1]
    ] = 0
    for a, b in zip(*(torch.autograd.grad((weight * o).sum(), leaves) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@examples(100)
@given(
    forests(), st.sampled_from([1, 4, 30, 10_000]), st.sampled_from([3, 16, 256]), st.sampled_from([1, 5, 32]),
    st.sampled_from([0, 20, 256]), st.sampled_from([1, 200, 1 << 16]), st.sampled_from([None, 0.3]),
    st.sampled_from([1, 2, 3]), st.integers(0, 2),
)  # fmt: skip
def test_equals_a_dense_mask_with_gradients(trees, long_run, chunk, block, far, gathered, scale, cp_size, rank):
    """Whatever is attended by runs, whatever in gathered blocks, and whichever queries are here."""
    pack = pack_of(trees, multiple=7, cp_size=cp_size, cp_rank=rank % cp_size)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LONG_RUN", long_run), ("CHUNK", chunk), ("QUERY_BLOCK", block)):
            patch.setattr(attention_cpu, name, value)
        patch.setattr(attention_cpu, "FAR", far)
        patch.setattr(attention_cpu, "GATHERED_KEYS", gathered)
        layout = CpuLayout.build(pack.subtree_end, pack.blocks, pack.local)
        check_equal(pack, layout, scale)


@pytest.mark.parametrize("heads, groups, size", [(4, 4, 8), (6, 2, 16), (3, 1, 80), (2, 1, 128), (1, 1, 256)])
def test_head_shapes(heads, groups, size):
    rng, ids = random.Random(5), itertools.count()
    pack = pack_of([grow(rng, nodes=9, max_segment=70, prompt=60, name="p", ids=ids)])
    layout = CpuLayout.build(pack.subtree_end, pack.blocks)
    assert layout.runs and layout.gathered, "both ways are taken"
    check_equal(pack, layout, None, heads=heads, groups=groups, size=size)


def test_pairs_grow_with_paths_and_not_with_the_square():
    """8 trees of 31 nodes: runs can ask for the visible pairs and no more, blocks for a few times that."""
    rng, ids = random.Random(2), itertools.count()
    trees = [grow(rng, nodes=30, max_segment=8, prompt=64, name="p", ids=ids) for _ in range(8)]
    pack = pack_of(trees)
    layout = CpuLayout.build(pack.subtree_end, pack.blocks)
    assert pack.attention_pairs <= layout.pairs <= 3 * pack.attention_pairs < len(pack.tokens) ** 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "LONG_RUN", 1)
        patch.setattr(attention_cpu, "CHUNK", 1)
        exact = CpuLayout.build(pack.subtree_end, pack.blocks)
        assert exact.pairs == pack.attention_pairs and not exact.gathered


def allocated_at_once(f):
    """Most bytes of tensors alive at once during `f` beyond those before, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_a_forest_of_100k_tokens_in_bounded_memory():
    """Masks and gathered indices stay below 400 entries a token, where a dense mask has 100,000; forward and backward
    together hold no more at once than a dozen arrays of the size of the queries."""
    rng, ids = random.Random(3), itertools.count()
    trees = [grow(rng, nodes=60, max_segment=64, prompt=200, name="p", ids=ids) for _ in range(60)]
    pack = pack_of(trees)
    assert len(pack.tokens) > 100_000
    layout = CpuLayout.build(pack.subtree_end, pack.blocks)
    held = sum(g.visible.numel() + g.key.numel() + g.query.numel() for g in layout.gathered)
    assert held <= 400 * len(pack.tokens)
    leaves = inputs(pack, heads=1, groups=1, size=8, dtype=torch.float32)
    peak = allocated_at_once(lambda: attend(*leaves, layout, None).sum().backward())
    array = 4 * 8 * len(pack.tokens)  # bytes of query, key, value, output, or the gradient of one of them
    assert 4 * array <= peak <= 12 * array
    assert all(bool(x.grad.isfinite().all()) for x in leaves)


def test_low_precision_stays_in_its_dtype():
    rng, ids = random.Random(4), itertools.count()
    pack = pack_of([grow(rng, nodes=9, max_segment=60, prompt=60, name="p", ids=ids)])
    layout = CpuLayout.build(pack.subtree_end, pack.blocks)
    low = [t.detach().bfloat16().requires_grad_() for t in inputs(pack, size=16)]
    high = [t.detach().double().requires_grad_() for t in low]
    got, want = attend(*low, layout, None), dense(*high, pack, None)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    got.sum().backward()
    want.sum().backward()
    assert all(a.grad.dtype == torch.bfloat16 for a in low)
    for a, b in zip(low, high, strict=True):
        assert (a.grad.double() - b.grad).norm() <= 2e-2 * b.grad.norm() + 1e-6


def test_handles_end_with_their_schedule():
    registry = PackRegistry()
    pack = pack_of([grow(random.Random(1), nodes=3, max_segment=4, prompt=2, name="p", ids=itertools.count())])
    a, b = (PackLayout.build(pack, torch.device("cpu")) for _ in range(2))
    first, second = registry.add(a), registry.add(b)
    assert registry.get(first) is a and registry.get(second) is b
    registry.clear()
    assert int(registry.add(a)) not in (int(first), int(second)), "a late backward never meets another pack"
    with pytest.raises(RuntimeError, match="its pipeline schedule has ended"):
        registry.get(first)
    assert not PACKS.layouts
