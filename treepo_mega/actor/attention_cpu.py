"""Tree attention on the CPU: exact, no T x T mask, memory linear in the pack.

In depth-first order a *run* of tokens without a branch in between is visible to one contiguous range of queries: its
own tokens, causally, and all that follow in its subtree. So each long run is one call of the flash kernel with a
slice of keys and a slice of queries, and no mask at all; a query meets its ancestors' runs one after the other, and
the partial softmaxes are merged by their log-sum-exp. Every (query, key) pair is computed once, and so is every
key's gradient: the kernel's backward takes the merged output and log-sum-exp, which makes each run's part exact.

Calls have a price, so keys in runs shorter than `LONG_RUN` are treated otherwise: queries are taken `QUERY_BLOCK` at
a time, the short-run keys that any of them sees are gathered (the ancestors of the first, and those in between),
and blocks that see about as many keys are attended in one batched call with a mask of [blocks, queries, keys].

    layout = CpuLayout.build(subtree_end, blocks, local)       # once per pack, shared by all layers and passes
    out = attend(query, key, value, layout, scale)             # [Q, H, D]; gradients by the same calls
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

LONG_RUN = 48
"""Tokens from which a run is worth a kernel call of its own."""
MAX_RUN = 256
"""Longer runs are cut: the kernel computes whole key blocks at the diagonal."""
QUERY_BLOCK = 32
GATHERED_KEYS = 1 << 16
"""Keys gathered for one batched call, at most (times query groups x head size elements)."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(slots=True)
class Run:
    """Keys [key_lo, key_hi) of the pack for queries [query_lo, query_hi) of this rank."""

    key_lo: int
    key_hi: int
    query_lo: int
    query_hi: int
    causal: bool
    """Query i of the range sees keys up to i; else all."""
    first: bool
    """No query of the range has met a key before: nothing to merge with."""


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
    first: bool
    """No query has met a key before."""
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

    @classmethod
    def build(
        cls, subtree_end: np.ndarray, blocks: list[tuple[int, int]], local: np.ndarray | None = None
    ) -> CpuLayout:
        """`local`: pack indices of this rank's queries, ascending (None: all). Padding attends to nothing: 0."""
        length = len(subtree_end)
        real = blocks[-1][1] if blocks else 0
        end = subtree_end[:real]
        own = np.arange(length) if local is None else local
        breaks = np.flatnonzero(np.diff(own) != 1) + 1
        # A run ends where visibility changes; the diagonal must not cross from one rank's tokens to another's.
        edges = np.flatnonzero(np.diff(end)) + 1 if real else np.zeros(0, np.int64)
        borders = np.unique(np.concatenate([[0, real], edges, own[breaks], own[breaks - 1] + 1, own[:1], own[-1:] + 1]))
        borders = borders[borders <= real]
        lo, hi = borders[:-1], borders[1:]
        long = hi - lo >= LONG_RUN
        short = np.repeat(~long, hi - lo)
        roots = {s for s, _ in blocks}
        runs = _runs(lo[long], hi[long], end, own, roots, short)
        gathered = _gathered(short, end, blocks, own, breaks, bool(long.any()))
        return cls(length, len(own), runs, gathered)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the kernels are asked for, masked ones of the gathered blocks included."""
        total = sum(int(g.visible.numel()) for g in self.gathered)
        for r in self.runs:
            n, m = r.key_hi - r.key_lo, r.query_hi - r.query_lo
            total += n * m - (n * (n - 1) // 2 if r.causal else 0)
        return total


def _runs(
    lo: np.ndarray, hi: np.ndarray, end: np.ndarray, own: np.ndarray, roots: set[int], short: np.ndarray
) -> list[Run]:
    out = []
    for a, b in zip(lo.tolist(), hi.tolist(), strict=True):
        last = int(end[a])
        for k in range(a, b, MAX_RUN):
            stop = min(k + MAX_RUN, b)
            q_lo, q_hi = np.searchsorted(own, [k, last]).tolist()
            if q_lo < q_hi:
                causal = bool(own[q_lo] == k)
                # Its queries begin with its own tokens, or behind all of them: the diagonal is here or elsewhere.
                out.append(Run(k, stop, q_lo, q_hi, causal, k in roots))
    return out


def _gathered(
    short: np.ndarray,
    end: np.ndarray,
    blocks: list[tuple[int, int]],
    own: np.ndarray,
    breaks: np.ndarray,
    merged: bool,
) -> list[Gathered]:
    """Batches of query blocks for the keys `short` [real]."""
    real = len(end)
    if not short.any():
        return []
    # Short-run keys that are open at t: those j <= t with end[j] > t.
    change = np.zeros(real + 1, np.int64)
    change[:real] += short
    np.subtract.at(change, end[short], 1)
    seen = np.cumsum(change)[:real]
    wanted = np.flatnonzero(seen[own[own < real]] > 0)
    if not len(wanted):
        return []
    token = own[wanted]
    tree = np.searchsorted([s for s, _ in blocks], token, side="right")
    new = np.flatnonzero(np.concatenate([[True], (np.diff(token) != 1) | (np.diff(tree) != 0)]))
    total = np.concatenate([[0], np.cumsum(short)])
    where = np.flatnonzero(short)
    parts = []
    for a, b in zip(new.tolist(), [*new[1:].tolist(), len(token)], strict=True):
        start = blocks[int(tree[a]) - 1][0]
        for i in range(a, b, QUERY_BLOCK):
            j = min(i + QUERY_BLOCK, b)
            t = int(token[i])
            before = where[total[start] : total[t]]
            between = where[total[t] : total[int(token[j - 1]) + 1]]
            parts.append((wanted[i:j], np.concatenate([before[end[before] > t], between])))
    parts.sort(key=lambda p: -len(p[1]))
    out, at = [], 0
    while at < len(parts):
        width = len(parts[at][1])
        most = max(1, GATHERED_KEYS // width)
        stop = at
        while stop < len(parts) and stop - at < most and 4 * len(parts[stop][1]) >= 3 * width - 32:
            stop += 1
        out.append(_batch(parts[at:stop], width, own, end, not merged))
        at = stop
    return out


def _batch(
    parts: list[tuple[np.ndarray, np.ndarray]], width: int, own: np.ndarray, end: np.ndarray, first: bool
) -> Gathered:
    height = max(len(q) for q, _ in parts)
    query = np.stack([np.pad(q, (0, height - len(q)), mode="edge") for q, _ in parts])
    key = np.stack([np.pad(k, (0, width - len(k)), mode="edge") for _, k in parts])
    inside = np.arange(height)[None] < np.array([len(q) for q, _ in parts])[:, None]
    real = np.arange(width)[None] < np.array([len(k) for _, k in parts])[:, None]
    q, k = own[query][:, :, None], key[:, None, :]
    visible = (k <= q) & (q < end[k]) & real[:, None, :]
    return Gathered(*(torch.from_numpy(x) for x in (query, key, inside)), torch.from_numpy(visible[:, None]), first)


def _heads_first(x: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D], or [B, n, H, D] -> [B, H, n, D]; a view."""
    return (x if x.dim() == 4 else x[None]).transpose(1, 2)


def _merge(out: Tensor, lse: Tensor, o: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial softmaxes as one: outputs [..., H, D], log-sum-exps [..., H] (-inf: nothing seen yet)."""
    total = torch.logaddexp(lse, part)
    return out * (lse - total).exp()[..., None] + o * (part - total).exp()[..., None], total


class _TreeAttention(torch.autograd.Function):
    """See the module docstring; saves its inputs, the output and the log-sum-exp, nothing per pair."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: CpuLayout, scale: float) -> Tensor:
        """query [Q, H, D], key and value [T, G, D] -> [Q, H, D]."""
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.zeros(query.shape, dtype=wide)
        lse = torch.full(query.shape[:2], float("-inf"), dtype=wide)
        for r in layout.runs:
            q, keys = slice(r.query_lo, r.query_hi), slice(r.key_lo, r.key_hi)
            o, part = _flash(
                _heads_first(query[q]), _heads_first(key[keys]), _heads_first(value[keys]), 0.0, r.causal, scale=scale
            )
            o, part = o[0].transpose(0, 1), part[0].transpose(0, 1)
            if r.first:
                out[q], lse[q] = o, part
            else:
                out[q], lse[q] = _merge(out[q], lse[q], o, part)
        for g in layout.gathered:
            q, k, v = (_heads_first(t[i]) for t, i in ((query, g.query), (key, g.key), (value, g.key)))
            o, part = _flash(q, k, v, 0.0, False, attn_mask=g.mask(query.dtype), scale=scale)
            index = g.query[g.inside]
            o, part = o.transpose(1, 2)[g.inside], part.transpose(1, 2)[g.inside]
            if g.first:
                out[index], lse[index] = o.to(wide), part
            else:
                out[index], lse[index] = _merge(out[index], lse[index], o, part)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        grad, layout, wide = grads[0].contiguous(), ctx.layout, lse.dtype
        d_query = torch.zeros(query.shape, dtype=wide)
        d_key, d_value = torch.zeros(key.shape, dtype=wide), torch.zeros(value.shape, dtype=wide)
        for r in layout.runs:
            q, keys = slice(r.query_lo, r.query_hi), slice(r.key_lo, r.key_hi)
            parts = (grad[q], query[q], key[keys], value[keys], out[q])
            dq, dk, dv = _flash_backward(
                *map(_heads_first, parts), lse[q].transpose(0, 1)[None], 0.0, r.causal, scale=ctx.scale
            )
            d_query[q] += dq[0].transpose(0, 1)
            d_key[keys], d_value[keys] = dk[0].transpose(0, 1), dv[0].transpose(0, 1)
        for g in layout.gathered:
            # Padding queries repeat a real one: their gradient is not asked for a second time.
            asked = grad[g.query] * g.inside[..., None, None]
            parts = (asked, query[g.query], key[g.key], value[g.key], out[g.query])
            dq, dk, dv = _flash_backward(
                *map(_heads_first, parts), lse[g.query].transpose(1, 2), 0.0, False,
                attn_mask=g.mask(query.dtype), scale=ctx.scale,
            )  # fmt: skip
            d_query.index_add_(0, g.query[g.inside], dq.transpose(1, 2)[g.inside].to(wide))
            where = g.key.flatten()
            d_key.index_add_(0, where, dk.transpose(1, 2).flatten(0, 1).to(wide))
            d_value.index_add_(0, where, dv.transpose(1, 2).flatten(0, 1).to(wide))
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None


def attend(query: Tensor, key: Tensor, value: Tensor, layout: CpuLayout, scale: float | None) -> Tensor:
    """Exact attention over a pack: query [Q, H, D], key and value [T, G, D] (G divides H) -> [Q, H, D].

    Q are this rank's tokens, T all tokens of the pack. `scale` None: 1/sqrt(D).
    """
    return _TreeAttention.apply(query, key, value, layout, scale or 1 / math.sqrt(query.shape[-1]))
