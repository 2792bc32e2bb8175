"""Who trains what: a forest cut into pieces, and the pieces dealt to data-parallel ranks and micro-batches. Pure NumPy.

    dealt = deal_forest(segments, dp_size=8, max_tokens=16384)
    dealt.per_rank[3]                    # the pieces of data-parallel rank 3
    dealt.bins(3)                        # ... by micro-batch

Lengths decide, and no token is looked at: ranks that hold the structure of a forest come to the same answer, and may
then fetch the tokens of their own pieces alone (`tree/stretches.py`). Linear in segments, but for one sort of pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mega.runtime.balance import balance, deal, fill
from treepo_mega.tree.segments import Bools, Segments
from treepo_mega.tree.split import pieces as cut_pieces
from treepo_mega.tree.sums import Ints, path_sums


@dataclass(slots=True)
class Pieces:
    """P pieces (`tree/split.py`), and their segments as E entries, one piece after the other."""

    piece_of_entry: Ints
    segment_of_entry: Ints
    counted_of_entry: Bools
    """[E] whether the entry's rows are counted here: False for prompts and for repeated context."""
    tokens: Ints
    """[P] tokens of each piece."""
    pairs: Ints
    """[P] attention pairs of each piece."""
    flat: Ints
    """[P] tokens of the trajectories that end in it."""
    anchor_of_segment: Ints
    """[S] nearest segment above with tokens: its last token predicts the segment's first. -1 for roots."""
    depth_of_segment: Ints
    """[S] segments above it, the root among them: 0 for roots."""

    def entries(self, chosen: Sequence[int]) -> Ints:
        """Indices of the entries of the pieces `chosen`, in that order."""
        pieces_chosen = np.asarray(chosen, np.int64)
        return ranges(
            np.searchsorted(self.piece_of_entry, pieces_chosen),
            np.searchsorted(self.piece_of_entry, pieces_chosen, side="right"),
        )


def ranges(start: Ints, end: Ints) -> Ints:
    """start[0], start[0]+1, .., end[0]-1, start[1], ..."""
    size = end - start
    return np.arange(int(size.sum())) + np.repeat(start - (np.cumsum(size) - size), size)


def cut_forest(segments: Segments, cuts: Ints) -> Pieces:
    """The pieces `cuts` [P, 3] (group, first leaf, one past the last) with their entries and costs."""
    first_of_group = np.searchsorted(segments.group, np.arange(len(segments.prompt) + 1))
    start_of_piece = first_of_group[cuts[:, 0]]
    end_of_piece = first_of_group[cuts[:, 0] + 1]
    # Every segment of a piece's tree, then those alone that have one of its leaves below them.
    piece = np.repeat(np.arange(len(cuts)), end_of_piece - start_of_piece)
    segment = ranges(start_of_piece, end_of_piece)
    is_here = (segments.leaf_hi[segment] > cuts[piece, 1]) & (segments.leaf_lo[segment] < cuts[piece, 2])
    piece = piece[is_here]
    segment = segment[is_here]
    length = segments.length[segment]
    pairs = length * segments.position[segment] + length * (length + 1) // 2
    length_of_leaf = (segments.position + segments.length)[segments.leaf_segment]
    if segments.ends is not None:
        # One by one, the hidden turns of a trajectory have contexts of their own.
        length_of_leaf = segments.ends.flat[segments.leaf_number]
    length_before_leaf = np.concatenate([[0], np.cumsum(length_of_leaf)])
    return Pieces(
        piece_of_entry=piece,
        segment_of_entry=segment,
        # A segment in two pieces is counted in the one that holds the first leaf below it.
        counted_of_entry=segments.trained[segment] & (segments.leaf_lo[segment] >= cuts[piece, 1]),
        tokens=np.bincount(piece, length, len(cuts)).astype(np.int64),
        pairs=np.bincount(piece, pairs, len(cuts)).astype(np.int64),
        flat=length_before_leaf[cuts[:, 2]] - length_before_leaf[cuts[:, 1]],
        anchor_of_segment=_anchors(segments),
        depth_of_segment=path_sums(segments.parent, (segments.parent >= 0).astype(np.int64)),
    )


def _anchors(segments: Segments) -> Ints:
    # A segment of no tokens has no last token: what follows it is predicted by the next one up that has tokens.
    has_tokens = (segments.length > 0) | (segments.parent < 0)
    holder = np.where(has_tokens, np.arange(len(segments)), segments.parent)
    while (moves := holder[holder] != holder).any():
        holder[moves] = holder[holder[moves]]
    return np.where(segments.parent >= 0, holder[segments.parent], -1)


@dataclass(slots=True)
class Dealt:
    """The pieces of one optimizer step, the same on every rank."""

    pieces: Pieces
    per_rank: list[list[int]]
    """The pieces of each data-parallel rank, ascending."""
    count: int
    """Micro-batches of every rank; some may be empty."""
    max_tokens: int
    """The most tokens of a micro-batch, padding left out."""

    def bins(self, dp_rank: int) -> list[list[int]]:
        """The pieces of each micro-batch of that rank."""
        own = self.per_rank[dp_rank]
        sizes = self.pieces.tokens[own].tolist()
        return [[own[i] for i in bin_] for bin_ in deal(sizes, self.max_tokens, self.count)]


def deal_forest(
    segments: Segments, *, dp_size: int, max_tokens: int, count_multiple: int = 1, pair_cost: float = 0.0
) -> Dealt:
    """Cut trees of more than `max_tokens` (`tree/split.py`), and deal the pieces to `dp_size` ranks.

    Pieces of a cut tree repeat their ancestors as context. The number of micro-batches is that of the fullest rank,
    raised to a multiple of `count_multiple` (Megatron's interleaved schedule wants whole groups of pipeline-size
    micro-batches). `pair_cost`: what an attention pair costs, in tokens. Raises ConfigError when a single trajectory is
    longer than `max_tokens`.
    """
    pieces = cut_forest(segments, cut_pieces(segments, max_tokens))
    # Ranks are evened out by time (tokens and attention), micro-batches by memory (tokens).
    per_rank = balance((pieces.tokens + pair_cost * pieces.pairs).tolist(), dp_size)
    needed = max(len(fill(pieces.tokens[chosen].tolist(), max_tokens)) for chosen in per_rank)
    # The same number on every data-parallel rank: Megatron's collectives pair up.
    count = math.ceil(max(1, needed) / count_multiple) * count_multiple
    return Dealt(pieces, per_rank, count, max_tokens)
