"""FlexAttention's mask function and BlockMask against the dense mask, on the CPU; the compiled kernel needs a GPU."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.actor.test_attention import dense, inputs, pack_of
from tests.properties import examples
from tests.tree.forests import grow
from treepo_mega.actor import attention_flex
from treepo_mega.actor.attention_flex import AttentionError, FlexLayout, attend, block_visibility, mask_function
from treepo_mega.runtime.device import has_cuda


def packs(seed, multiple, cp_size=1, rank=0):
    rng, ids = random.Random(seed), itertools.count()
    trees = [grow(rng, nodes=10, max_segment=12, prompt=rng.randint(1, 30), name="p", ids=ids) for _ in range(3)]
    return pack_of(trees, multiple=multiple, cp_size=cp_size, cp_rank=rank)


def dense_mask(pack):
    """[Q, T] bool by the definition."""
    q = torch.arange(len(pack.tokens)) if pack.local is None else torch.from_numpy(pack.local)
    k = torch.arange(len(pack.tokens))
    return (k[None] <= q[:, None]) & (q[:, None] < torch.from_numpy(pack.subtree_end)[None])


def from_blocks(mask, shape, block):
    """What a BlockMask lets through: full blocks whole, partial ones by the mask function."""
    out = torch.zeros(shape, dtype=torch.bool)
    for number, index, full in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for i in range(number.shape[-1]):
            for j in index[0, 0, i, : int(number[0, 0, i])].tolist():
                q = torch.arange(i * block, min((i + 1) * block, shape[0]))
                k = torch.arange(j * block, min((j + 1) * block, shape[1]))
                seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), q[:, None], k[None])
                out[q[:, None], k[None]] |= torch.ones_like(seen) if full else seen
    return out


@examples(40)
@given(st.integers(0, 1 << 20), st.sampled_from([16, 32]), st.sampled_from([1, 5, 32]), st.sampled_from([1, 2]))
def test_block_mask_is_the_dense_mask(seed, block, multiple, cp_size):
    for rank in range(cp_size):
        pack = packs(seed, multiple, cp_size, rank)
        want = dense_mask(pack)
        layout = FlexLayout.build(pack.subtree_end, torch.device("cpu"), pack.local, block)
        assert torch.equal(from_blocks(layout.mask, want.shape, block), want)


@examples(40)
@given(st.integers(0, 1 << 20))
def test_blocks_are_those_that_torch_finds(seed):
    """`create_block_mask` looks at every pair; the intervals give the same blocks without."""
    pack, block = packs(seed, 32), 32
    some, full = block_visibility(pack.subtree_end, None, block)
    end, length = torch.from_numpy(pack.subtree_end), len(pack.tokens)
    want = create_block_mask(mask_function(end, None), 1, 1, length, length, device="cpu", BLOCK_SIZE=block)
    for number, index, mine in (
        (want.kv_num_blocks, want.kv_indices, some & ~full),
        (want.full_kv_num_blocks, want.full_kv_indices, full),
    ):
        for i in range(len(mine)):
            assert sorted(index[0, 0, i, : int(number[0, 0, i])].tolist()) == np.flatnonzero(mine[i]).tolist()


def test_eager_flex_attention_equals_the_dense_mask():
    pack = packs(3, 32)
    q, k, v = (t.detach().float() for t in inputs(pack, size=16))
    layout = FlexLayout.build(pack.subtree_end, torch.device("cpu"), None, 32)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    with torch.no_grad():
        got = flex_attention(*heads, block_mask=layout.mask, enable_gqa=True)[0].transpose(0, 1)
    real = pack.blocks[-1][1]
    torch.testing.assert_close(got[:real], dense(q, k, v, pack, None)[:real], rtol=1e-4, atol=1e-5)


PASSES = ((False, False), (False, True), (True, True))
"""(gradients on?, inputs require them?): old logprobs; the forward of a recomputed layer; its recomputation."""


def fresh_attention(monkeypatch) -> list[int]:
    """Compile attention anew with a backend that appends to the list returned and computes nothing."""
    graphs: list[int] = []

    def count(module, _):
        graphs.append(len(list(module.graph.nodes)))
        return lambda *args: (next(x for x in args if isinstance(x, torch.Tensor) and x.dim() == 4).clone(),)

    compiled = attention_flex.compiled_attention(count)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    # FlexAttention refuses gradients on a CPU before it compiles; here nothing is computed.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    return graphs


def attend_in(length, gradients, require, local=None):
    """One pass over a pack of `length` tokens that is a single chain."""
    layout = FlexLayout.build(np.full(length, length), torch.device("cpu"), local)
    queries = length if local is None else len(local)
    q, k, v = (torch.zeros(n, h, 8, requires_grad=require) for n, h in ((queries, 4), (length, 2), (length, 2)))
    with torch.set_grad_enabled(gradients):
        assert attend(q, k, v, layout, None).shape == q.shape


def count_graphs(monkeypatch, lengths, cp_size=1):
    """Graphs that all passes over packs of these lengths cost; of the first of 2 * cp_size parts and the last."""
    graphs = fresh_attention(monkeypatch)
    for length in lengths:
        parts = np.arange(length).reshape(2 * cp_size, -1)
        local = None if cp_size == 1 else parts[[0, -1]].reshape(-1)
        for gradients, require in PASSES:
            attend_in(length, gradients, require, local)
    return len(graphs)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_32_pack_lengths_cost_no_more_than_8_graphs(monkeypatch, cp_size):
    lengths = range(attention_flex.SHAPE_BUCKET, 33 * attention_flex.SHAPE_BUCKET, attention_flex.SHAPE_BUCKET)
    assert len(lengths) == 32
    assert len(PASSES) <= count_graphs(monkeypatch, lengths, cp_size) <= 8


def test_a_variant_beyond_the_limit_is_an_error_and_not_dense_scores(monkeypatch):
    monkeypatch.setattr(attention_flex, "COMPILED_VARIANTS", 2)
    graphs = fresh_attention(monkeypatch)
    for gradients, require in PASSES[:2]:
        attend_in(512, gradients, require)
    message = (
        r"already has 2 compiled variants.*queries \[512, 4, 8\], keys \[512, 2, 8\], torch.float32, with gradients"
        r".*train\.max_tokens_per_gpu"
    )
    with pytest.raises(AttentionError, match=message):
        attend_in(512, *PASSES[2])
    assert len(graphs) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="the compiled kernel and its backward need a CUDA device")
def test_compiled_flex_attention_with_gradients():
    pack = packs(3, 512)
    leaves = [t.detach().float().cuda().requires_grad_() for t in inputs(pack, size=64)]
    same = [t.detach().cpu().double().requires_grad_() for t in leaves]
    got = attend(*leaves, FlexLayout.build(pack.subtree_end, torch.device("cuda")), None)
    want = dense(*same, pack, None)
    real = pack.blocks[-1][1]
    torch.testing.assert_close(got[:real].cpu().double(), want[:real], rtol=1e-2, atol=1e-2)
    got[:real].sum().backward()
    want[:real].sum().backward()
    for a, b in zip(leaves, same, strict=True):
        assert (a.grad.cpu().double() - b.grad).norm() <= 1e-2 * b.grad.norm()
