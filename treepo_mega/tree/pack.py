"""Packs: what the trainer computes on, every shared token once. Pure NumPy.

A *pack* is one micro-batch: one sequence of *blocks*, each a tree or a piece of one, in depth-first pre-order. A
*row* is one predicted token. All of it is a pure function of its arguments: every rank computes the same plan, and no
metadata is exchanged. The example of `tree/segments.py`, padded to 10 tokens, with leaf advantages 1, -2 and 4:

>>> from treepo_mega.tree.node import Tree
>>> tree = Tree.start("a prompt", [10, 11])
>>> for parent, tokens in [(0, [20, 21]), (1, [30]), (1, [40, 41]), (0, [50])]:
...     child = tree.add_child(parent)
...     child.tokens, child.logprobs = tokens, [-token / 100 for token in tokens]
>>> tree.leaves = [2, 3, 4]
>>> segments = Segments.from_trees([tree], prompts=[7])
>>> credit = fold(segments, np.array([1.0, -2.0, 4.0]), np.ones(3))
>>> plan = plan_step(Batch(segments, credit), dp_size=1, dp_rank=0, max_tokens=16, multiple=5)
>>> for name in ("tokens", "position", "subtree_end", "blocks"):
...     print(f"{name:<11}", *getattr(plan.packs[0], name))
tokens      10 11 20 21 30 40 41 50 0 0
position    0 1 2 3 4 4 5 2 0 0
subtree_end 8 8 7 7 5 7 7 8 9 10
blocks      (0, 8)
>>> for name in ("predictor", "target", "A_pos", "A_neg", "n", "count", "rollout_logprobs", "trajectory", "depth"):
...     print(f"{name:<16}", *getattr(plan.packs[0], name))
predictor        1 2 3 3 5 1
target           20 21 30 40 41 50
A_pos            1.0 1.0 1.0 0.0 0.0 4.0
A_neg            -2.0 -2.0 0.0 -2.0 -2.0 0.0
n                2.0 2.0 1.0 1.0 1.0 1.0
count            2.0 2.0 1.0 1.0 1.0 1.0
rollout_logprobs -0.2 -0.21 -0.3 -0.4 -0.41 -0.5
trajectory       0 0 0 1 1 2
depth            1 1 2 2 2 1
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mega.tree.credit import Credit, Lesson, fold, leaf_weights
from treepo_mega.tree.deal import Dealt, Pieces, deal_forest, ranges
from treepo_mega.tree.routing import ExpertIds, padded
from treepo_mega.tree.segments import Bools, Floats, Ints, Segments, Trajectory

CHUNKS_PER_RANK = 4
"""Chunks of a pack that a context-parallel rank owns; more even out attention better and cut more runs."""


@dataclass(slots=True)
class Pack:
    """One micro-batch of T tokens (padding included) and N rows (of this rank).

    At a branch the parent's last token predicts several rows, one per child.
    """

    tokens: Ints
    """[T] ids."""
    position: Ints
    """[T] depth inside the token's own trajectory: what RoPE rotates by."""
    subtree_end: Ints
    """[T] key j is visible to query i if and only if j <= i < subtree_end[j]. Depth-first order makes one interval
    per key exact."""
    blocks: list[tuple[int, int]]
    """[start, end) of each tree in the pack; padding after the last block belongs to none."""
    predictor: Ints
    """[N] index into `local` (into the pack without context parallelism) of the token whose hidden state predicts."""
    target: Ints
    """[N] the predicted token's id."""
    # Two masses, not their sum: once the ratio is clipped, a net advantage gives another loss (`loss/policy.py`).
    A_pos: Floats
    """[N] positive advantages of the trajectories through the token, summed (`tree/credit.py`)."""
    A_neg: Floats
    """[N] negative ones."""
    n: Floats
    """[N] loss weight: the multiplicity, under token-mean."""
    count: Floats
    """[N] multiplicity: trajectories through the token."""
    rollout_logprobs: Floats
    """[N] the engine's logprob of the token, nats."""
    trajectory: Ints
    """[N] number of the (first) trajectory through the token."""
    segment: Ints
    """[N] segment of the step that the token belongs to: new masses are looked up by it (`relearn`)."""
    depth: Ints
    """[N] segments between the prompt and the token, its own included."""
    local: Ints | None = None
    """[T/cp] pack indices of this context-parallel rank, ascending; None: all of them."""
    order: Ints | None = None
    """[T] place of each token when the ranks' `local` tokens are concatenated in rank order; None as for `local`."""
    old_logprobs: np.ndarray | None = None
    """Actor logprobs before the update, on last-pipeline-stage ranks."""
    on_policy: bool = False
    """Whether the weights have not moved since before the update: then its own forward pass gives the logprobs from
    before it, and they may be missing here."""
    fresh: Bools | None = None
    """[N] whether the engine sampled the token with the weights that the step begins with; None: all of them."""
    ref_logprobs: np.ndarray | None = None
    experts: ExpertIds | None = None
    """[T, layers, top_k] the experts that the engine chose, the type's largest number where none are noted (padding,
    ends of paths); None: the trees carry none."""
    watched: object | None = None
    """The rows that the FP8 guard sampled in the old-logprob pass (`loss/guard.py: Sample`), for the update."""
    unseen: bool = False
    """Whether no pass over the rollout came before its first update, which is this pack's: the FP8 guard then takes its
    sample in the update."""

    @property
    def pairs(self) -> int:
        """(trajectory, token) pairs of this rank's rows: their sum over ranks is what the loss is divided by."""
        return int(self.count.sum())

    @property
    def attention_pairs(self) -> int:
        """Visible (query, key) pairs of the whole pack, padding left out."""
        end = self.blocks[-1][1] if self.blocks else 0
        return int((self.position[:end] + 1).sum())

    def relearn(self, credit: Credit) -> None:
        """Give the rows the masses, weights and counts of `credit`, which is of the step's segments."""
        self.A_pos = credit.A_pos[self.segment]
        self.A_neg = credit.A_neg[self.segment]
        self.n = credit.n[self.segment]
        self.count = credit.count[self.segment].astype(np.float64)


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
    lesson: Lesson | None = None
    """What the packs of all ranks were folded from; None where nothing changes it."""


@dataclass(slots=True)
class Batch:
    """The trajectories of one optimizer step."""

    segments: Segments
    credit: Credit

    @classmethod
    def flat(cls, trajectories: Sequence[Trajectory], loss_agg_mode: str = "token-mean") -> Batch:
        """Trajectories one by one, shared tokens repeated."""
        segments = Segments.from_paths(trajectories)
        advantages = np.array([trajectory.advantage for trajectory in trajectories], np.float64)
        return cls(segments, fold(segments, advantages, leaf_weights(loss_agg_mode, segments.flat_lengths())))


def split_steps(prompts: Sequence[int], steps: int) -> list[list[int]]:
    """Indices of `prompts` dealt to optimizer steps in order, as evenly as prompts allow; no prompt is split."""
    distinct = sorted(set(prompts))
    bounds = np.linspace(0, len(distinct), steps + 1).round().astype(int)
    step_of_prompt = {prompt: int(np.searchsorted(bounds, i, side="right")) - 1 for i, prompt in enumerate(distinct)}
    dealt: list[list[int]] = [[] for _ in range(steps)]
    for i, prompt in enumerate(prompts):
        dealt[step_of_prompt[prompt]].append(i)
    return dealt


@dataclass(slots=True)
class _Layout:
    """The E entries of one pack: where each stands in its token sequence. `real` tokens, before padding."""

    segment_of_entry: Ints
    counted_of_entry: Bools
    block_of_entry: Ints
    """[E] 0 for the entries of the first piece of the pack, 1 for the second, ..."""
    start_of_entry: Ints
    """[E] pack index of the entry's first token."""
    end_of_entry: Ints
    """[E] one past its last."""
    key_of_entry: Ints
    """[E] (block, segment) as one number, ascending: `entry_of` finds an entry by it."""
    real: int

    @classmethod
    def of(cls, segments: Segments, pieces: Pieces, chosen: Sequence[int]) -> _Layout:
        """The pieces `chosen`, one after the other."""
        entries = pieces.entries(chosen)
        segment = pieces.segment_of_entry[entries]
        block = np.zeros(len(entries), np.int64)
        if len(entries):
            block = np.cumsum(np.concatenate([[0], np.diff(pieces.piece_of_entry[entries]) != 0]))
        length = segments.length[segment]
        end = np.cumsum(length)
        return cls(
            segment_of_entry=segment,
            counted_of_entry=pieces.counted_of_entry[entries],
            block_of_entry=block,
            start_of_entry=end - length,
            end_of_entry=end,
            # Ascending, because pieces are in the order chosen and the segments of a piece in pre-order.
            key_of_entry=block * len(segments) + segment,
            real=int(length.sum()),
        )

    def entry_of(self, key: Ints) -> Ints:
        """The first entry of at least this key; E beyond all."""
        return np.searchsorted(self.key_of_entry, key)

    def blocks(self) -> list[tuple[int, int]]:
        """[start, end) of each block's tokens."""
        first_entries = np.flatnonzero(np.diff(self.block_of_entry, prepend=-1))
        return list(itertools.pairwise([*self.start_of_entry[first_entries].tolist(), self.real]))


def _pack(batch: Batch, pieces: Pieces, chosen: Sequence[int], length: int, pad_id: int) -> Pack:
    """Lay the pieces `chosen` one after the other, padded to `length` tokens."""
    layout = _Layout.of(batch.segments, pieces, chosen)
    tokens, position, source_of_token = _tokens(batch.segments, layout, length, pad_id)
    predictor, token_of_row, segment_of_row = _rows(batch.segments, layout, pieces.anchor_of_segment)
    credit = batch.credit
    return Pack(
        tokens=tokens,
        position=position,
        subtree_end=_visibility(batch.segments, layout, length),
        blocks=layout.blocks(),
        predictor=predictor,
        target=tokens[token_of_row],
        A_pos=credit.A_pos[segment_of_row],
        A_neg=credit.A_neg[segment_of_row],
        n=credit.n[segment_of_row],
        count=credit.count[segment_of_row].astype(np.float64),
        rollout_logprobs=batch.segments.logprobs[source_of_token[token_of_row]],
        trajectory=batch.segments.first_trajectory(segment_of_row),
        segment=segment_of_row,
        depth=pieces.depth_of_segment[segment_of_row],
        experts=_experts(batch.segments.experts, source_of_token, length),
    )


def _experts(ids: ExpertIds, source_of_token: Ints, length: int) -> ExpertIds | None:
    """[length, layers, top_k] of the tokens at `source_of_token`, then padding; None where the forest carries none."""
    return padded(ids[source_of_token], length) if ids.shape[1] else None


def _tokens(segments: Segments, layout: _Layout, length: int, pad_id: int) -> tuple[Ints, Ints, Ints]:
    """[T] ids and [T] positions, padded to `length`; without padding, each token's index in `segments.tokens`."""
    size = segments.length[layout.segment_of_entry]
    index = np.arange(layout.real)
    source_of_token = np.repeat(segments.source[layout.segment_of_entry] - layout.start_of_entry, size) + index
    tokens = np.full(length, pad_id, np.int64)
    tokens[: layout.real] = segments.tokens[source_of_token]
    position = np.zeros(length, np.int64)
    position[: layout.real] = (
        np.repeat(segments.position[layout.segment_of_entry] - layout.start_of_entry, size) + index
    )
    return tokens, position, source_of_token


def _visibility(segments: Segments, layout: _Layout, length: int) -> Ints:
    """[T] `subtree_end`: one past the last token below each one; padding is visible to itself alone."""
    # The first entry beyond a subtree has the smallest key of at least this; segments of other pieces leave gaps.
    beyond = layout.entry_of(layout.key_of_entry + segments.below[layout.segment_of_entry])
    end_of_subtree = np.append(layout.start_of_entry, layout.real)[beyond]
    subtree_end = np.arange(1, length + 1)
    subtree_end[: layout.real] = np.repeat(end_of_subtree, segments.length[layout.segment_of_entry])
    return subtree_end


def _rows(segments: Segments, layout: _Layout, anchor_of_segment: Ints) -> tuple[Ints, Ints, Ints]:
    """[N] predictor, [N] pack index of the predicted token, [N] its segment: one row per token counted here."""
    counted = layout.counted_of_entry
    token_of_row = ranges(layout.start_of_entry[counted], layout.end_of_entry[counted])
    if not len(token_of_row):
        return token_of_row, token_of_row, token_of_row
    size = segments.length[layout.segment_of_entry]
    entry_of_row = np.repeat(np.flatnonzero(counted), size[counted])
    # A segment's first token is predicted by the last one above it, which stands anywhere before it; the others by
    # their neighbour. Roots have no anchor; they are prompts and never counted, so any entry will do for them.
    anchor = np.maximum(anchor_of_segment[layout.segment_of_entry], 0)
    anchor_of_entry = layout.entry_of(layout.block_of_entry * len(segments) + anchor)
    is_first = token_of_row == layout.start_of_entry[entry_of_row]
    above_of_row = layout.end_of_entry[anchor_of_entry[entry_of_row]] - 1
    return np.where(is_first, above_of_row, token_of_row - 1), token_of_row, layout.segment_of_entry[entry_of_row]


def own_part(pack: Pack, cp_size: int, cp_rank: int) -> Pack:
    """The share of `pack` of one context-parallel rank: as many tokens for each, about as many attention pairs.

    Raises ValueError when the length is not a multiple of cp_size * CHUNKS_PER_RANK.
    """
    if cp_size == 1:
        return pack
    length = len(pack.tokens)
    chunks = cp_size * CHUNKS_PER_RANK
    if length % chunks:
        raise ValueError(f"a pack of {length} tokens does not divide into {chunks} chunks")
    owner_of_chunk = _chunk_owners(pack, chunks, cp_size)
    by_owner = np.argsort(np.repeat(owner_of_chunk, length // chunks), kind="stable")
    share = length // cp_size
    local = by_owner[cp_rank * share : (cp_rank + 1) * share]
    order = np.empty(length, np.int64)
    order[by_owner] = np.arange(length)
    # A row belongs to the rank that has its predictor: hidden states stay where they are.
    local_of_token = np.full(length, -1, np.int64)
    local_of_token[local] = np.arange(len(local))
    kept = local_of_token[pack.predictor] >= 0
    rows = ("target", "A_pos", "A_neg", "n", "count", "rollout_logprobs", "trajectory", "segment", "depth")
    return Pack(
        tokens=pack.tokens,
        position=pack.position,
        subtree_end=pack.subtree_end,
        blocks=pack.blocks,
        predictor=local_of_token[pack.predictor][kept],
        local=local,
        order=order,
        experts=pack.experts,
        **{name: getattr(pack, name)[kept] for name in rows},
    )


def _chunk_owners(pack: Pack, chunks: int, cp_size: int) -> Ints:
    """[chunks] rank of each: the most expensive chunk first, to the rank with the least work that has room."""
    # Padding after the last block costs nothing: no row looks at it.
    end = pack.blocks[-1][1] if pack.blocks else 0
    visible = np.where(np.arange(len(pack.tokens)) < end, pack.position + 1, 0)
    pairs_of_chunk = visible.reshape(chunks, -1).sum(1)
    load_of_rank = np.zeros(cp_size)
    room_of_rank = np.full(cp_size, CHUNKS_PER_RANK)
    owner_of_chunk = np.empty(chunks, np.int64)
    # Stable: ranks must agree on the order of equal chunks.
    for chunk in np.argsort(-pairs_of_chunk, kind="stable").tolist():
        rank = int(np.argmin(np.where(room_of_rank > 0, load_of_rank, np.inf)))
        owner_of_chunk[chunk] = rank
        load_of_rank[rank] += pairs_of_chunk[chunk]
        room_of_rank[rank] -= 1
    return owner_of_chunk


def plan_step(
    batch: Batch | Sequence[Trajectory],
    *,
    dp_size: int,
    dp_rank: int,
    max_tokens: int,
    multiple: int = 1,
    count_multiple: int = 1,
    equal_lengths: bool = False,
    on_all_ranks: bool = False,
    pair_cost: float = 0.0,
    cp_size: int = 1,
    cp_rank: int = 0,
    pad_id: int = 0,
) -> StepPlan:
    """Micro-batches of one optimizer step for `dp_rank`: at most `max_tokens` tokens each, before padding.

    A list of trajectories is the flat batch. Dealing (`deal_forest`), then laying out (`lay_out`), whose arguments
    these are. Raises ValueError when a single trajectory is longer than `max_tokens`.
    """
    batch = batch if isinstance(batch, Batch) else Batch.flat(batch)
    dealt = deal_forest(
        batch.segments,
        dp_size=dp_size,
        max_tokens=max_tokens,
        count_multiple=count_multiple,
        pair_cost=pair_cost,
    )
    return lay_out(
        batch,
        dealt,
        dp_rank=dp_rank,
        multiple=multiple,
        equal_lengths=equal_lengths,
        on_all_ranks=on_all_ranks,
        cp_size=cp_size,
        cp_rank=cp_rank,
        pad_id=pad_id,
    )


def lay_out(
    batch: Batch,
    dealt: Dealt,
    *,
    dp_rank: int,
    multiple: int = 1,
    equal_lengths: bool = False,
    on_all_ranks: bool = False,
    cp_size: int = 1,
    cp_rank: int = 0,
    pad_id: int = 0,
) -> StepPlan:
    """The micro-batches that `dealt` gives `dp_rank`; only its tokens are looked at.

    Lengths are padded to `multiple`, and to one length for all with `equal_lengths` (Megatron's pipeline with fixed
    buffers; `on_all_ranks`: the same on all data-parallel ranks). Ranks with fewer micro-batches than the fullest get
    padding.
    """
    pieces = dealt.pieces
    bins = dealt.bins(dp_rank)
    if cp_size > 1:
        multiple = math.lcm(multiple, cp_size * CHUNKS_PER_RANK)
    sizes = [int(pieces.tokens[chosen].sum()) for chosen in bins]
    # Without `on_all_ranks` the longest of this rank's packs is enough: no pipeline spans two data-parallel ranks.
    others = [dealt.bins(rank) for rank in range(len(dealt.per_rank))] if on_all_ranks else [bins]
    longest = max(int(pieces.tokens[chosen].sum()) for of_rank in others for chosen in of_rank)
    lengths = [-(-max(size, 2) // multiple) * multiple for size in ([longest] * len(bins) if equal_lengths else sizes)]
    packs = [_pack(batch, pieces, chosen, length, pad_id) for chosen, length in zip(bins, lengths, strict=True)]
    return StepPlan(
        packs=[own_part(pack, cp_size, cp_rank) for pack in packs],
        real_tokens=sum(sizes),
        padded_tokens=sum(lengths),
        flat_tokens=int(pieces.flat[dealt.per_rank[dp_rank]].sum()),
    )
