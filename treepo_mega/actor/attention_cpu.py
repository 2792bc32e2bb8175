"""Tree attention on the CPU: exact, every visible pair once, no T x T mask, memory linear in the pack.

In depth-first order a *run* is a stretch of tokens without a branch in between. Its queries see the runs above it,
which are a few slices of the pack, and then each other causally. So a run is attended `CHUNK` queries at a time by
the flash kernel over its ancestors' keys laid end to end, with a mask that is a strided view of one small template
(nothing hidden, but for the diagonal at the end): no partial softmax is ever merged, no mask is stored.

Kernel calls have a price, so runs shorter than `LONG_RUN` are taken together: `QUERY_BLOCK` consecutive queries see
the ancestors of the first and what lies in between, those keys are gathered, and blocks that see about as many are
attended in one batched call with a mask of [blocks, queries, keys]. Short runs more than `FAR` tokens down get calls
of their own all the same, which bounds those masks.

    layout = CpuLayout.build(subtree_end, blocks, local)       # once per pack, shared by all layers and passes
    out = attend(query, key, value, layout, scale)             # [Q, H, D]; gradients by the same calls

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

LONG_RUN = 32
"""Tokens from which a run is worth kernel calls of its own."""
CHUNK = 64
"""Queries of one call: the kernel also computes what the mask hides of a chunk's own square."""
QUERY_BLOCK = 32
FAR = 256
"""Depth, in tokens, up to which short runs are gathered."""
GATHERED_KEYS = 1 << 15
"""Keys gathered for one batched call, at most (times query groups x head size elements)."""

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
        return [(a, min(a + CHUNK, self.size)) for a in range(0, self.size, CHUNK)]


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
        here = np.full(length + 1, -1, np.int64)
        here[own] = np.arange(len(own))
        # A run ends where visibility changes; it must not cross from one rank's tokens to another's either.
        edges = np.flatnonzero((np.diff(end) != 0) | ((here[1:real] < 0) != (here[: max(real - 1, 0)] < 0))) + 1
        borders = [0, *edges.tolist(), real] if real else [0]
        runs, short = _runs(borders, end, here)
        return cls(length, len(own), runs, _gathered(short, end, blocks, here))

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the kernels are asked for, masked ones included."""
        total = sum(int(g.visible.numel()) for g in self.gathered)
        return total + sum((b - a) * (r.before + b) for r in self.runs for a, b in r.chunks())

    def mask(self, before: int, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """[end - start, before + end] additive: queries `start` to `end` of a run behind `before` tokens. A view."""
        if dtype not in self.template:
            widest = max(r.before + r.size for r in self.runs)
            square = torch.full((CHUNK, CHUNK), float("-inf"), dtype=dtype).triu_(1)
            self.template[dtype] = torch.cat((torch.zeros(CHUNK, widest, dtype=dtype), square), 1)
        last = self.template[dtype].shape[1] - CHUNK
        return self.template[dtype][: end - start, last - before - start : last + end - start]


def _runs(borders: list[int], end: np.ndarray, here: np.ndarray) -> tuple[list[Run], np.ndarray]:
    """(runs worth calls of their own, [real] bool: queries of this rank that are in none)."""
    out, short = [], here[: len(end)] >= 0
    above: list[tuple[int, int, int]] = []  # (start, end, subtree end) of the runs above
    for a, b in itertools.pairwise(borders):
        while above and above[-1][2] <= a:
            above.pop()
        before = sum(stop - start for start, stop, _ in above)
        if here[a] >= 0 and (b - a >= LONG_RUN or before > FAR):
            keys: list[slice] = []
            for start, stop, _ in [*above, (a, b, 0)]:
                if keys and keys[-1].stop == start:
                    keys[-1] = slice(keys[-1].start, stop)
                else:
                    keys.append(slice(start, stop))
            out.append(Run(int(here[a]), b - a, keys, before))
            short[a:b] = False
        above.append((a, b, int(end[a])))
    return out, short


def _gathered(short: np.ndarray, end: np.ndarray, blocks: list[tuple[int, int]], here: np.ndarray) -> list[Gathered]:
    """Batches of query blocks for the pack indices `short` [real]."""
    token = np.flatnonzero(short)
    if not len(token):
        return []
    tree = np.searchsorted([s for s, _ in blocks], token, side="right")
    new = np.flatnonzero(np.concatenate([[True], (np.diff(token) != 1) | (np.diff(tree) != 0)]))
    parts = []
    for a, b in zip(new.tolist(), [*new[1:].tolist(), len(token)], strict=True):
        start = blocks[int(tree[a]) - 1][0]
        for i in range(a, b, QUERY_BLOCK):
            # Whoever of the block's queries has an ancestor before the first query shares it with the first query.
            t, last = int(token[i]), int(token[min(i + QUERY_BLOCK, b) - 1])
            seen = np.flatnonzero(end[start:t] > t) + start
            parts.append((np.arange(t, last + 1), np.concatenate([seen, np.arange(t, last + 1)])))
    parts.sort(key=lambda p: -len(p[1]))
    out, at = [], 0
    while at < len(parts):
        width = len(parts[at][1])
        stop = at
        while stop < len(parts) and (stop - at) * width < GATHERED_KEYS and 4 * len(parts[stop][1]) >= 3 * width - 32:
            stop += 1
        out.append(_batch(parts[at:stop], width, end, here))
        at = stop
    return out


def _batch(parts: list[tuple[np.ndarray, np.ndarray]], width: int, end: np.ndarray, here: np.ndarray) -> Gathered:
    height = max(len(q) for q, _ in parts)
    query = np.stack([np.pad(q, (0, height - len(q)), mode="edge") for q, _ in parts])
    key = np.stack([np.pad(k, (0, width - len(k)), mode="edge") for _, k in parts])
    inside = np.arange(height)[None] < np.array([len(q) for q, _ in parts])[:, None]
    real = np.arange(width)[None] < np.array([len(k) for _, k in parts])[:, None]
    q, k = query[:, :, None], key[:, None, :]
    visible = (k <= q) & (q < end[k]) & real[:, None, :]
    return Gathered(
        query=torch.from_numpy(here[query]),
        key=torch.from_numpy(key),
        inside=torch.from_numpy(inside),
        visible=torch.from_numpy(visible[:, None]),
    )


def _heads_first(x: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D], or [B, n, H, D] -> [B, H, n, D]; a view."""
    return (x if x.dim() == 4 else x[None]).transpose(1, 2)


def _joined(x: Tensor, parts: list[slice]) -> Tensor:
    """The slices `parts` of `x` end to end; a view when there is one."""
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[p] for p in parts])


class _TreeAttention(torch.autograd.Function):
    """See the module docstring; saves its inputs, the output and the log-sum-exp, nothing per pair."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: CpuLayout, scale: float) -> Tensor:
        """query [Q, H, D], key and value [T, G, D] -> [Q, H, D]."""
        out = torch.zeros(query.shape, dtype=query.dtype)
        lse = torch.zeros(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for r in layout.runs:
            k, v = _joined(key, r.keys), _joined(value, r.keys)
            for a, b in r.chunks():
                at, seen = slice(r.query + a, r.query + b), r.before + b
                o, part = _flash(
                    *map(_heads_first, (query[at], k[:seen], v[:seen])), 0.0, False,
                    attn_mask=layout.mask(r.before, a, b, query.dtype), scale=scale,
                )  # fmt: skip
                out[at], lse[at] = o[0].transpose(0, 1), part[0].transpose(0, 1)
        for g in layout.gathered:
            q, k, v = (_heads_first(t[i]) for t, i in ((query, g.query), (key, g.key), (value, g.key)))
            o, part = _flash(q, k, v, 0.0, False, attn_mask=g.mask(query.dtype), scale=scale)
            index = g.query[g.inside]
            out[index], lse[index] = o.transpose(1, 2)[g.inside], part.transpose(1, 2)[g.inside]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value; sums over queries in fp32 (fp64)."""
        query, key, value, out, lse = ctx.saved_tensors
        grad, layout = grads[0].contiguous(), ctx.layout
        d_query = torch.zeros_like(query)
        d_key, d_value = torch.zeros(key.shape, dtype=lse.dtype), torch.zeros(value.shape, dtype=lse.dtype)
        for r in layout.runs:
            _run_backward(r, ctx.scale, layout, (grad, query, key, value, out, lse), (d_query, d_key, d_value))
        for g in layout.gathered:
            # Padding queries repeat a real one: their gradient is not asked for a second time.
            asked = grad[g.query] * g.inside[..., None, None]
            parts = (asked, query[g.query], key[g.key], value[g.key], out[g.query])
            dq, dk, dv = _flash_backward(
                *map(_heads_first, parts), lse[g.query].transpose(1, 2), 0.0, False,
                attn_mask=g.mask(query.dtype), scale=ctx.scale,
            )  # fmt: skip
            d_query[g.query[g.inside]] = dq.transpose(1, 2)[g.inside]
            where = g.key.flatten()
            d_key.index_add_(0, where, dk.transpose(1, 2).flatten(0, 1).to(lse.dtype))
            d_value.index_add_(0, where, dv.transpose(1, 2).flatten(0, 1).to(lse.dtype))
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _run_backward(
    r: Run, scale: float, layout: CpuLayout, saved: tuple[Tensor, ...], into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add one run's part to (d_query, d_key, d_value). `saved`: (grad, query, key, value, out, lse)."""
    grad, query, key, value, out, lse = saved
    d_query, d_key, d_value = into
    k, v = _joined(key, r.keys), _joined(value, r.keys)
    single = len(r.keys) == 1
    total_k = d_key[r.keys[0]] if single else torch.zeros(k.shape, dtype=d_key.dtype)
    total_v = d_value[r.keys[0]] if single else torch.zeros(v.shape, dtype=d_value.dtype)
    for a, b in r.chunks():
        at, seen = slice(r.query + a, r.query + b), r.before + b
        parts = (grad[at], query[at], k[:seen], v[:seen], out[at])
        dq, dk, dv = _flash_backward(
            *map(_heads_first, parts), lse[at].transpose(0, 1)[None], 0.0, False,
            attn_mask=layout.mask(r.before, a, b, query.dtype), scale=scale,
        )  # fmt: skip
        d_query[at] = dq[0].transpose(0, 1)
        total_k[:seen] += dk[0].transpose(0, 1)
        total_v[:seen] += dv[0].transpose(0, 1)
    start = 0
    for part in [] if single else r.keys:
        size = part.stop - part.start
        d_key[part] += total_k[start : start + size]
        d_value[part] += total_v[start : start + size]
        start += size


def attend(query: Tensor, key: Tensor, value: Tensor, layout: CpuLayout, scale: float | None) -> Tensor:
    """Exact attention over a pack: query [Q, H, D], key and value [T, G, D] (G divides H) -> [Q, H, D].

    Q are this rank's tokens, T all tokens of the pack. `scale` None: 1/sqrt(D).
    """
    return _TreeAttention.apply(query, key, value, layout, scale or 1 / math.sqrt(query.shape[-1]))
