"""Tree attention on the CPU: exact, every visible pair once, no T x T mask, memory linear in the pack.

    layout = CpuLayout.build(subtree_end, blocks, local)       # once per pack, shared by all layers and passes
    out = attend(query, key, value, layout, scale)             # [Q, H, D]; gradients by the same calls

In depth-first order a *run* is a stretch of tokens without a branch in between. Its queries see the runs above it,
which are a few slices of the pack, and then each other causally. A run is attended `CHUNK` queries at a time by the
flash kernel: its ancestors' keys are laid end to end, and the mask is a strided view of one small template. No
partial softmax is merged and no mask is stored.

Runs shorter than `LONG_RUN` are taken together: `QUERY_BLOCK` consecutive queries gather the ancestors of the first
and what lies in between. Blocks that see about as many keys are attended in one batched call.

Padding attends to nothing: its output and gradients are 0.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A kernel call has a price: a short run of its own would cost more in the call than in the arithmetic.
LONG_RUN = 32
"""Tokens from which a run is worth kernel calls of its own."""
CHUNK = 64
"""Queries of one call: the kernel also computes what the mask hides of a chunk's own square."""
QUERY_BLOCK = 32
# The mask of gathered queries grows with their depth. Deeper short runs get calls of their own: that bounds it.
FAR = 256
"""Depth, in tokens, up to which short runs are gathered."""
GATHERED_KEYS = 1 << 15
"""Keys gathered for one batched call, at most (times query groups x head size elements)."""

# Not F.scaled_dot_product_attention: it keeps the log-sum-exp to itself, and the backward operator takes it.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(slots=True)
class Run:
    """Queries [query, query + size) of this rank: consecutive tokens of the pack, which see all of `keys`."""

    query: int
    size: int
    keys: list[slice]
    """Slices of the pack, ascending: the ancestors' tokens, then the run's own."""
    before: int
    """Tokens of the ancestors."""

    def chunks(self) -> list[tuple[int, int]]:
        """[start, end) of the calls within the run."""
        return [(start, min(start + CHUNK, self.size)) for start in range(0, self.size, CHUNK)]


@dataclass(slots=True)
class Gathered:
    """Query blocks attended together: B blocks of Q queries and K keys, padded by repetition."""

    query: Tensor
    """[B, Q] indices into this rank's queries."""
    key: Tensor
    """[B, K] pack indices."""
    inside: Tensor
    """[B, Q] bool: not padding."""
    visible: Tensor
    """[B, 1, Q, K] bool."""
    bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """0 where visible, -inf elsewhere; made once per dtype."""
        if dtype not in self.bias:
            zero = torch.zeros(self.visible.shape, dtype=dtype)
            self.bias[dtype] = zero.masked_fill_(~self.visible, float("-inf"))
        return self.bias[dtype]


@dataclass(slots=True)
class CpuLayout:
    """How the queries of this rank meet the keys of a pack."""

    keys: int
    queries: int
    runs: list[Run]
    gathered: list[Gathered]
    template: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls, subtree_end: np.ndarray, blocks: list[tuple[int, int]], local: np.ndarray | None = None
    ) -> CpuLayout:
        """`local`: pack indices of this rank's queries, ascending (None: all)."""
        length = len(subtree_end)
        real = blocks[-1][1] if blocks else 0
        end = subtree_end[:real]
        own = np.arange(length) if local is None else local
        query_of_token = np.full(length + 1, -1, np.int64)
        query_of_token[own] = np.arange(len(own))
        # A run ends where visibility changes; it must not cross from one rank's tokens to another's either.
        elsewhere = query_of_token < 0
        changes = (np.diff(end) != 0) | (elsewhere[1:real] != elsewhere[: max(real - 1, 0)])
        borders = [0, *(np.flatnonzero(changes) + 1).tolist(), real] if real else [0]
        runs, short = _runs(borders, end, query_of_token)
        return cls(length, len(own), runs, _gathered(short, end, blocks, query_of_token))

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the kernels are asked for, masked ones included."""
        total = sum(int(gathered.visible.numel()) for gathered in self.gathered)
        return total + sum((end - start) * (run.before + end) for run in self.runs for start, end in run.chunks())

    def mask(self, before: int, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """[end - start, before + end] additive: queries `start` to `end` of a run after `before` tokens. A view."""
        if dtype not in self.template:
            # Nothing hidden, then a causal square: each mask is a window that ends on the square's diagonal.
            widest = max(run.before + run.size for run in self.runs)
            square = torch.full((CHUNK, CHUNK), float("-inf"), dtype=dtype).triu_(1)
            self.template[dtype] = torch.cat((torch.zeros(CHUNK, widest, dtype=dtype), square), 1)
        last = self.template[dtype].shape[1] - CHUNK
        return self.template[dtype][: end - start, last - before - start : last + end - start]


def _runs(borders: list[int], end: np.ndarray, query_of_token: np.ndarray) -> tuple[list[Run], np.ndarray]:
    """(runs worth calls of their own, [real] bool: queries of this rank that are in none)."""
    runs: list[Run] = []
    short = query_of_token[: len(end)] >= 0
    above: list[tuple[int, int, int]] = []  # (start, stop, subtree end) of the runs above
    for start, stop in itertools.pairwise(borders):
        while above and above[-1][2] <= start:
            above.pop()
        before = sum(past - first for first, past, _ in above)
        if query_of_token[start] >= 0 and (stop - start >= LONG_RUN or before > FAR):
            keys = _merged([(first, past) for first, past, _ in above] + [(start, stop)])
            runs.append(Run(int(query_of_token[start]), stop - start, keys, before))
            short[start:stop] = False
        above.append((start, stop, int(end[start])))
    return runs, short


def _merged(stretches: list[tuple[int, int]]) -> list[slice]:
    """Ascending [start, stop) stretches as slices, neighbours as one."""
    # One slice is a view of the keys, several are a copy: see `_joined`.
    slices: list[slice] = []
    for start, stop in stretches:
        if slices and slices[-1].stop == start:
            slices[-1] = slice(slices[-1].start, stop)
        else:
            slices.append(slice(start, stop))
    return slices


def _gathered(
    short: np.ndarray, end: np.ndarray, blocks: list[tuple[int, int]], query_of_token: np.ndarray
) -> list[Gathered]:
    """Batches of query blocks for the pack indices `short` [real]."""
    token = np.flatnonzero(short)
    if not len(token):
        return []
    tree = np.searchsorted([start for start, _ in blocks], token, side="right")
    is_first = np.concatenate([[True], (np.diff(token) != 1) | (np.diff(tree) != 0)])
    borders = [*np.flatnonzero(is_first).tolist(), len(token)]
    parts = []
    for start, stop in itertools.pairwise(borders):
        tree_start = blocks[int(tree[start]) - 1][0]
        for index in range(start, stop, QUERY_BLOCK):
            # If a query of the block has an ancestor before the first query, the first query has it too.
            first = int(token[index])
            queries = np.arange(first, int(token[min(index + QUERY_BLOCK, stop) - 1]) + 1)
            seen = np.flatnonzero(end[tree_start:first] > first) + tree_start
            parts.append((queries, np.concatenate([seen, queries])))
    # Longest first: a batch is as wide as its first block, and the others are padded to it.
    parts.sort(key=lambda part: -len(part[1]))
    batches = []
    at = 0
    while at < len(parts):
        width = len(parts[at][1])
        stop = at
        while stop < len(parts) and (stop - at) * width < GATHERED_KEYS and 4 * len(parts[stop][1]) >= 3 * width - 32:
            stop += 1
        batches.append(_batch(parts[at:stop], width, end, query_of_token))
        at = stop
    return batches


def _batch(
    parts: list[tuple[np.ndarray, np.ndarray]], width: int, end: np.ndarray, query_of_token: np.ndarray
) -> Gathered:
    height = max(len(queries) for queries, _ in parts)
    # Padding repeats the last index, which is always valid; `inside` and `real` leave it out.
    query = np.stack([np.pad(queries, (0, height - len(queries)), mode="edge") for queries, _ in parts])
    key = np.stack([np.pad(keys, (0, width - len(keys)), mode="edge") for _, keys in parts])
    inside = np.arange(height)[None] < np.array([len(queries) for queries, _ in parts])[:, None]
    real = np.arange(width)[None] < np.array([len(keys) for _, keys in parts])[:, None]
    query_column = query[:, :, None]
    key_row = key[:, None, :]
    visible = (key_row <= query_column) & (query_column < end[key_row]) & real[:, None, :]
    return Gathered(
        query=torch.from_numpy(query_of_token[query]),
        key=torch.from_numpy(key),
        inside=torch.from_numpy(inside),
        visible=torch.from_numpy(visible[:, None]),
    )


def _heads_first(x: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D], or [B, n, H, D] -> [B, H, n, D]; a view."""
    return (x if x.dim() == 4 else x[None]).transpose(1, 2)


def _joined(x: Tensor, parts: list[slice]) -> Tensor:
    """The slices `parts` of `x` end to end; a view when there is one."""
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])


class _TreeAttention(torch.autograd.Function):
    """See the module docstring; saves its inputs, the output and the log-sum-exp, nothing per pair."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: CpuLayout, scale: float) -> Tensor:
        """query [Q, H, D], key and value [T, G, D] -> [Q, H, D]."""
        # Padding is in no run and keeps these zeros. Unwritten memory could hold NaN, and 0 times NaN is NaN.
        out = torch.zeros(query.shape, dtype=query.dtype)
        lse = torch.zeros(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for run in layout.runs:
            run_key = _joined(key, run.keys)
            run_value = _joined(value, run.keys)
            for start, end in run.chunks():
                at = slice(run.query + start, run.query + end)
                seen = run.before + end
                part_out, part_lse = _flash(
                    *map(_heads_first, (query[at], run_key[:seen], run_value[:seen])), 0.0, False,
                    attn_mask=layout.mask(run.before, start, end, query.dtype), scale=scale,
                )  # fmt: skip
                out[at] = part_out[0].transpose(0, 1)
                lse[at] = part_lse[0].transpose(0, 1)
        for batch in layout.gathered:
            parts = (query[batch.query], key[batch.key], value[batch.key])
            part_out, part_lse = _flash(
                *map(_heads_first, parts), 0.0, False, attn_mask=batch.mask(query.dtype), scale=scale
            )
            index = batch.query[batch.inside]
            out[index] = part_out.transpose(1, 2)[batch.inside]
            lse[index] = part_lse.transpose(1, 2)[batch.inside]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout = layout
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value; sums over queries in fp32 (fp64)."""
        query, key, value, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        layout = ctx.layout
        d_query = torch.zeros_like(query)
        # A key is seen by many queries: its gradient is a long sum, which bf16 would round at every step.
        d_key = torch.zeros(key.shape, dtype=lse.dtype)
        d_value = torch.zeros(value.shape, dtype=lse.dtype)
        for run in layout.runs:
            _run_backward(run, ctx.scale, layout, (grad, query, key, value, out, lse), (d_query, d_key, d_value))
        for batch in layout.gathered:
            # Padding queries repeat a real one: their gradient is not asked for a second time.
            asked = grad[batch.query] * batch.inside[..., None, None]
            parts = (asked, query[batch.query], key[batch.key], value[batch.key], out[batch.query])
            part_query, part_key, part_value = _flash_backward(
                *map(_heads_first, parts), lse[batch.query].transpose(1, 2), 0.0, False,
                attn_mask=batch.mask(query.dtype), scale=ctx.scale,
            )  # fmt: skip
            d_query[batch.query[batch.inside]] = part_query.transpose(1, 2)[batch.inside]
            where = batch.key.flatten()
            d_key.index_add_(0, where, part_key.transpose(1, 2).flatten(0, 1).to(lse.dtype))
            d_value.index_add_(0, where, part_value.transpose(1, 2).flatten(0, 1).to(lse.dtype))
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _run_backward(
    run: Run, scale: float, layout: CpuLayout, saved: tuple[Tensor, ...], into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add one run's part to (d_query, d_key, d_value). `saved`: (grad, query, key, value, out, lse)."""
    grad, query, key, value, out, lse = saved
    d_query, d_key, d_value = into
    run_key = _joined(key, run.keys)
    run_value = _joined(value, run.keys)
    # Keys in one slice: add to the result in place. Else add to a copy, and that to the result, slice by slice.
    single = len(run.keys) == 1
    total_key = d_key[run.keys[0]] if single else torch.zeros(run_key.shape, dtype=d_key.dtype)
    total_value = d_value[run.keys[0]] if single else torch.zeros(run_value.shape, dtype=d_value.dtype)
    for start, end in run.chunks():
        at = slice(run.query + start, run.query + end)
        seen = run.before + end
        parts = (grad[at], query[at], run_key[:seen], run_value[:seen], out[at])
        part_query, part_key, part_value = _flash_backward(
            *map(_heads_first, parts), lse[at].transpose(0, 1)[None], 0.0, False,
            attn_mask=layout.mask(run.before, start, end, query.dtype), scale=scale,
        )  # fmt: skip
        d_query[at] = part_query[0].transpose(0, 1)
        total_key[:seen] += part_key[0].transpose(0, 1)
        total_value[:seen] += part_value[0].transpose(0, 1)
    offset = 0
    for part in [] if single else run.keys:
        size = part.stop - part.start
        d_key[part] += total_key[offset : offset + size]
        d_value[part] += total_value[offset : offset + size]
        offset += size


def attend(query: Tensor, key: Tensor, value: Tensor, layout: CpuLayout, scale: float | None) -> Tensor:
    """Exact attention over a pack: query [Q, H, D], key and value [T, G, D] (G divides H) -> [Q, H, D].

    Q are this rank's tokens, T all tokens of the pack. `scale` None: 1/sqrt(D).
    """
    return _TreeAttention.apply(query, key, value, layout, scale or 1 / math.sqrt(query.shape[-1]))
