"""Packs: what the trainer computes on, every shared token once. Pure NumPy.

A *pack* is one micro-batch as one token sequence of *blocks*. A block is a tree, or a piece of one, laid out in
depth-first pre-order. Per token the pack states

    tokens[T], position[T]      id, and depth inside its own trajectory (what RoPE rotates by)
    subtree_end[T]              key j is visible to query i  iff  j <= i < subtree_end[j]

(depth-first order makes one interval per key exact), and per predicted token, a *row*, the pack index whose hidden
state predicts it (`predictor`), the token (`target`), masses, weight, multiplicity (`tree/credit.py`) and the
engine's logprob. At a branch the parent's last token predicts several: one row per child. Masses, not a net
advantage: see `loss/policy.py`.

    batch = Batch(segments, credit)                    # or Batch.flat(trajectories)
    plan = plan_step(batch, dp_size=..., dp_rank=..., max_tokens=...)

From a forest to packs: trees above `max_tokens` are cut (`tree/split.py`); a cut-off piece repeats its ancestors as
context, and only one piece holds the rows of a repeated token. Pieces are dealt to data-parallel ranks by cost
(tokens, and attention pairs at `pair_cost` tokens each), a rank's pieces to its micro-batches by tokens
(`runtime/balance.py`). Every data-parallel rank has the same number of micro-batches, for Megatron's collectives pair
up; lengths are each pack's own unless `equal_lengths` (Megatron's pipeline with fixed buffers).

Context parallelism: the pack is cut into chunks, every rank of the group owns as many of them, chosen to even out
attention pairs, and holds the rows whose predictor it owns (`Pack.local`).

All of it is a pure function of its arguments, so every rank computes the same plan and no metadata is exchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mega.runtime.balance import balance, deal, fill
from treepo_mega.tree.credit import Credit, fold, leaf_weights
from treepo_mega.tree.segments import Floats, Ints, Segments, Trajectory
from treepo_mega.tree.split import pieces

CHUNKS_PER_RANK = 4
"""Chunks of a pack that a context-parallel rank owns; more even out attention better and cut more runs."""


@dataclass(slots=True)
class Pack:
    """One micro-batch; see the module docstring for the fields. N rows (of this rank), T padded tokens."""

    tokens: Ints
    position: Ints
    subtree_end: Ints
    blocks: list[tuple[int, int]]
    """[start, end) of each tree in the pack; padding after the last block belongs to none."""
    predictor: Ints
    """[N] index into `local` (into the pack without context parallelism)."""
    target: Ints
    A_pos: Floats
    A_neg: Floats
    n: Floats
    """[N] loss weight: the multiplicity, under token-mean."""
    count: Floats
    """[N] multiplicity: trajectories through the token."""
    rollout_logprobs: Floats
    trajectory: Ints
    """[N] number of the (first) trajectory through the token."""
    local: Ints | None = None
    """[T/cp] pack indices of this context-parallel rank, ascending; None: all of them."""
    order: Ints | None = None
    """[T] place of each token when the ranks' `local` tokens are concatenated in rank order; None as for `local`."""
    old_logprobs: np.ndarray | None = None
    """Actor logprobs before the update, on last-pipeline-stage ranks."""
    ref_logprobs: np.ndarray | None = None
    watched: object | None = None
    """The rows that the FP8 guard sampled in the old-logprob pass (`loss/guard.py: Sample`), for the update."""

    @property
    def pairs(self) -> int:
        """(trajectory, token) pairs of this rank's rows: their sum over ranks is what the loss is divided by."""
        return int(self.count.sum())

    @property
    def attention_pairs(self) -> int:
        """Visible (query, key) pairs of the whole pack, padding left out."""
        end = self.blocks[-1][1] if self.blocks else 0
        return int((self.position[:end] + 1).sum())


@dataclass(slots=True)
class StepPlan:
    """One optimizer step of one data-parallel rank, and what it costs."""

    packs: list[Pack]
    real_tokens: int = 0
    """Tokens computed, padding left out."""
    padded_tokens: int = 0
    """Tokens computed, padding included."""
    flat_tokens: int = 0
    """Tokens (prompts included) of the trajectories whose leaves are here, one by one."""


@dataclass(slots=True)
class Batch:
    """The trajectories of one optimizer step."""

    segments: Segments
    credit: Credit

    @classmethod
    def flat(cls, trajectories: Sequence[Trajectory], loss_agg_mode: str = "token-mean") -> Batch:
        """Trajectories one by one, shared tokens repeated."""
        s = Segments.from_paths(trajectories)
        advantages = np.array([t.advantage for t in trajectories], np.float64)
        return cls(s, fold(s, advantages, leaf_weights(loss_agg_mode, s.flat_lengths())))


def split_steps(prompts: Sequence[int], steps: int) -> list[list[int]]:
    """Indices of `prompts` dealt to optimizer steps in order, as evenly as prompts allow; no prompt is split."""
    distinct = sorted(set(prompts))
    bounds = np.linspace(0, len(distinct), steps + 1).round().astype(int)
    step = {p: int(np.searchsorted(bounds, i, side="right")) - 1 for i, p in enumerate(distinct)}
    out: list[list[int]] = [[] for _ in range(steps)]
    for i, p in enumerate(prompts):
        out[step[p]].append(i)
    return out


@dataclass(slots=True)
class _Blocks:
    """Segments of all pieces, one piece after the other: entry e is segment `segment[e]` in piece `piece[e]`."""

    piece: Ints
    segment: Ints
    counted: np.ndarray
    """Whether the entry's rows are counted here: False for prompts and for repeated context."""
    tokens: Ints
    """[P] tokens of each piece."""
    pairs: Ints
    """[P] attention pairs of each piece."""
    flat: Ints
    """[P] tokens of the trajectories that end in it."""
    anchor: Ints
    """[S] nearest segment above with tokens: its last token predicts the segment's first. -1 for roots."""

    def entries(self, chosen: Sequence[int]) -> Ints:
        """Indices of the entries of the pieces `chosen`, in that order."""
        lo = np.searchsorted(self.piece, np.asarray(chosen, np.int64))
        hi = np.searchsorted(self.piece, np.asarray(chosen, np.int64), side="right")
        return _ranges(lo, hi)


def _ranges(lo: Ints, hi: Ints) -> Ints:
    """lo[0], lo[0]+1, .., hi[0]-1, lo[1], ..."""
    size = hi - lo
    return np.arange(int(size.sum())) + np.repeat(lo - (np.cumsum(size) - size), size)


def _blocks(s: Segments, cut: Ints) -> _Blocks:
    bounds = np.searchsorted(s.group, np.arange(len(s.prompt) + 1))
    lo, hi = bounds[cut[:, 0]], bounds[cut[:, 0] + 1]
    piece, segment = np.repeat(np.arange(len(cut)), hi - lo), _ranges(lo, hi)
    first, last = cut[piece, 1], cut[piece, 2]
    present = (s.leaf_hi[segment] > first) & (s.leaf_lo[segment] < last)
    piece, segment, first = piece[present], segment[present], first[present]
    size = s.length[segment]
    pairs = size * s.position[segment] + size * (size + 1) // 2
    path = (s.position + s.length)[s.leaf_segment]
    reached = np.concatenate([[0], np.cumsum(path)])
    return _Blocks(
        piece=piece,
        segment=segment,
        counted=s.trained[segment] & (s.leaf_lo[segment] >= first),
        tokens=np.bincount(piece, size, len(cut)).astype(np.int64),
        pairs=np.bincount(piece, pairs, len(cut)).astype(np.int64),
        flat=reached[cut[:, 2]] - reached[cut[:, 1]],
        anchor=_anchors(s),
    )


def _anchors(s: Segments) -> Ints:
    up = np.where((s.length > 0) | (s.parent < 0), np.arange(len(s)), s.parent)
    while (further := up[up] != up).any():
        up[further] = up[up[further]]
    return np.where(s.parent >= 0, up[s.parent], -1)


def _pack(batch: Batch, blocks: _Blocks, chosen: Sequence[int], length: int, pad_id: int) -> Pack:
    """Lay the pieces `chosen` one after the other, padded to `length` tokens."""
    s, at = batch.segments, blocks.entries(chosen)
    segment, counted = blocks.segment[at], blocks.counted[at]
    order = np.zeros(len(at), np.int64)
    if len(at):
        order = np.cumsum(np.concatenate([[0], np.diff(blocks.piece[at]) != 0]))
    size = s.length[segment]
    after = np.cumsum(size)
    start = after - size
    key = order * len(s) + segment  # ascending: pieces in the order chosen, segments in pre-order
    beyond = np.searchsorted(key, key + s.below[segment])
    end = np.append(start, after[-1:])[beyond]
    real = int(size.sum())
    token = np.repeat(s.source[segment] - start, size) + np.arange(real)
    out = {name: np.zeros(length, np.int64) for name in ("tokens", "position")}
    out["tokens"][real:] = pad_id
    out["tokens"][:real] = s.tokens[token]
    out["position"][:real] = np.repeat(s.position[segment] - start, size) + np.arange(real)
    subtree_end = np.arange(1, length + 1)
    subtree_end[:real] = np.repeat(end, size)
    # One row per token of a counted segment, predicted by the token before it in its trajectory.
    of = np.searchsorted(key, order * len(s) + np.maximum(blocks.anchor[segment], 0))
    row = np.repeat(np.arange(len(at))[counted], size[counted])
    target = _ranges(start[counted], after[counted])
    is_first = target == start[row]
    predictor = np.where(is_first, after[of[row]] - 1, target - 1) if len(row) else target
    c, of_row = batch.credit, segment[row]
    edges = [*np.flatnonzero(np.diff(order, prepend=-1)).tolist(), len(at)]
    borders = [int(start[e]) if e < len(at) else real for e in edges]
    return Pack(
        **out,
        subtree_end=subtree_end,
        blocks=list(itertools.pairwise(borders)),
        predictor=predictor,
        target=out["tokens"][target],
        A_pos=c.A_pos[of_row],
        A_neg=c.A_neg[of_row],
        n=c.n[of_row],
        count=c.count[of_row].astype(np.float64),
        rollout_logprobs=s.logprobs[token[target]],
        trajectory=s.leaf_number[s.leaf_lo[of_row]],
    )


def own_part(pack: Pack, cp_size: int, cp_rank: int) -> Pack:
    """The share of `pack` of one context-parallel rank: as many tokens for each, about as many attention pairs.

    Raises ValueError when the length is not a multiple of cp_size * CHUNKS_PER_RANK.
    """
    if cp_size == 1:
        return pack
    length, chunks = len(pack.tokens), cp_size * CHUNKS_PER_RANK
    if length % chunks:
        raise ValueError(f"a pack of {length} tokens does not divide into {chunks} chunks")
    visible = np.where(np.arange(length) < (pack.blocks[-1][1] if pack.blocks else 0), pack.position + 1, 0)
    costs = visible.reshape(chunks, -1).sum(1)
    load, room = np.zeros(cp_size), np.full(cp_size, CHUNKS_PER_RANK)
    owner = np.empty(chunks, np.int64)
    for c in np.argsort(-costs, kind="stable").tolist():
        owner[c] = r = int(np.argmin(np.where(room > 0, load, np.inf)))
        load[r] += costs[c]
        room[r] -= 1
    by_owner = np.argsort(np.repeat(owner, length // chunks), kind="stable")
    share = length // cp_size
    local = by_owner[cp_rank * share : (cp_rank + 1) * share]
    order = np.empty(length, np.int64)
    order[by_owner] = np.arange(length)
    where = np.full(length, -1, np.int64)
    where[local] = np.arange(len(local))
    kept = where[pack.predictor] >= 0
    rows = ("target", "A_pos", "A_neg", "n", "count", "rollout_logprobs", "trajectory")
    return Pack(
        tokens=pack.tokens,
        position=pack.position,
        subtree_end=pack.subtree_end,
        blocks=pack.blocks,
        predictor=where[pack.predictor][kept],
        local=local,
        order=order,
        **{name: getattr(pack, name)[kept] for name in rows},
    )


def plan_step(
    batch: Batch | Sequence[Trajectory],
    *,
    dp_size: int,
    dp_rank: int,
    max_tokens: int,
    multiple: int = 1,
    count_multiple: int = 1,
    equal_lengths: bool = False,
    pair_cost: float = 0.0,
    cp_size: int = 1,
    cp_rank: int = 0,
    pad_id: int = 0,
) -> StepPlan:
    """Micro-batches of one optimizer step for `dp_rank`: at most `max_tokens` tokens each, before padding.

    A list of trajectories is the flat batch. Lengths are padded to `multiple`; the number of micro-batches is that
    of the fullest rank, raised to a multiple of `count_multiple` (Megatron's interleaved schedule wants whole groups
    of pipeline-size micro-batches); ranks with less get padding. `pair_cost`: what an attention pair costs, in
    tokens. Raises ValueError when a single trajectory is longer than `max_tokens`.
    """
    batch = batch if isinstance(batch, Batch) else Batch.flat(batch)
    blocks = _blocks(batch.segments, pieces(batch.segments, max_tokens))
    tokens = blocks.tokens.tolist()
    per_rank = balance((blocks.tokens + pair_cost * blocks.pairs).tolist(), dp_size)
    needed = max(len(fill([tokens[i] for i in r], max_tokens)) for r in per_rank)
    count = math.ceil(max(1, needed) / count_multiple) * count_multiple
    mine = per_rank[dp_rank]
    dealt = [[mine[i] for i in b] for b in deal([tokens[i] for i in mine], max_tokens, count)]
    if cp_size > 1:
        multiple = math.lcm(multiple, cp_size * CHUNKS_PER_RANK)
    sizes = [sum(tokens[i] for i in b) for b in dealt]
    lengths = [max(1, -(-max(size, 2) // multiple)) * multiple for size in sizes]
    if equal_lengths:
        lengths = [max(lengths)] * count
    packs = [_pack(batch, blocks, b, n, pad_id) for b, n in zip(dealt, lengths, strict=True)]
    return StepPlan(
        packs=[own_part(p, cp_size, cp_rank) for p in packs],
        real_tokens=sum(sizes),
        padded_tokens=sum(lengths),
        flat_tokens=int(blocks.flat[mine].sum()),
    )
