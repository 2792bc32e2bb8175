"""Attention over a pack against a dense mask, on random trees and flat blocks with padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_mega.actor import attention
from treepo_mega.actor.attention import PACKS, PackLayout, PackRegistry, attend


@st.composite
def packs(draw):
    """(length, blocks, subtree_end): random trees in depth-first pre-order or single paths, then padding."""
    end: list[int] = []
    blocks = []
    for _ in range(draw(st.integers(0, 4))):
        start, size = len(end), draw(st.integers(1, 14))
        # parent[i] < i; pre-order: a token's parent is on the path to the token before it.
        path, parents = [0], [-1]
        for i in range(1, size):
            keep = draw(st.integers(1, len(path))) if draw(st.booleans()) else len(path)
            path = path[:keep]
            parents.append(path[-1])
            path.append(i)
        local = list(range(1, size + 1))
        for i in range(size - 1, 0, -1):
            local[parents[i]] = max(local[parents[i]], local[i])
        end += [start + e for e in local]
        blocks.append((start, start + size))
    padding = draw(st.integers(0 if end else 1, 5))
    length = len(end) + padding
    end += list(range(len(end) + 1, length + 1))
    return length, blocks, np.array(end)


def dense(query, key, value, end, scale):
    """One T x T mask and plain softmax attention."""
    i = torch.arange(len(end))
    visible = (i[None] <= i[:, None]) & (i[:, None] < torch.from_numpy(end)[None])
    share = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(share, 1) for t in (key, value))
    scores = torch.einsum("thd,shd->hts", query, k) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("hts,shd->thd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


@settings(max_examples=80, deadline=None)
@given(packs(), st.sampled_from([1, 30, 100, 1 << 24]), st.sampled_from([None, 0.3]))
def test_equals_a_dense_mask_with_gradients(pack, mask_elements, scale):
    length, blocks, end = pack
    g = torch.Generator().manual_seed(length)
    leaves = [torch.randn(length, h, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MASK_ELEMENTS", mask_elements)  # from one block at a time to all at once
        layout = PackLayout.build(length, blocks, end, torch.device("cpu"))
    covered = np.zeros(length, int)
    for b in layout.batches:
        np.add.at(covered, b.index[b.inside].numpy(), 1)
        assert b.index.numel() * b.index.shape[1] <= max(mask_elements, b.index.shape[1] ** 2)
    assert (covered == 1).all(), "every token is a query once, padding included"
    got, want = attend(*leaves, layout, scale), dense(*leaves, end, scale)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weight = torch.randn(got.shape, generator=g, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((weight * o).sum(), leaves) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_single_paths_need_no_mask():
    end = np.array([3, 3, 3, 5, 5])
    layout = PackLayout.build(5, [(0, 3), (3, 5)], end, torch.device("cpu"))
    assert [b.mask for b in layout.batches] == [None]
    branching = PackLayout.build(3, [(0, 3)], np.array([3, 2, 3]), torch.device("cpu"))
    assert branching.batches[0].mask is not None


def test_siblings_and_other_trees_do_not_see_each_other():
    # Two trees: root 0 with children 1 and 2; root 3. A token's value reaches its own descendants only.
    end = np.array([3, 2, 3, 4])
    layout = PackLayout.build(4, [(0, 3), (3, 4)], end, torch.device("cpu"))
    q, k = torch.zeros(4, 1, 4), torch.zeros(4, 1, 4)
    seen = attend(q, k, torch.eye(4)[:, None], layout, None)[:, 0] > 0
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_low_precision_stays_in_its_dtype():
    layout = PackLayout.build(4, [(0, 4)], np.array([4, 4, 4, 4]), torch.device("cpu"))
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    out = attend(x, x[:, :1], x[:, :1], layout, None)
    assert out.dtype == torch.bfloat16
    want = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (x, x[:, :1], x[:, :1])), is_causal=True,
                                          enable_gqa=True)[0].transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(out, want)


def test_handles_end_with_their_schedule():
    registry = PackRegistry()
    a, b = (PackLayout(n, []) for n in (1, 2))
    first, second = registry.add(a), registry.add(b)
    assert registry.get(first) is a and registry.get(second) is b
    registry.clear()
    assert int(registry.add(a)) not in (int(first), int(second)), "a late backward never meets another pack"
    with pytest.raises(RuntimeError, match="its pipeline schedule has ended"):
        registry.get(first)
    assert not PACKS.layouts
