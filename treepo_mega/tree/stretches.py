"""Tokens, logprobs and experts of parts of a forest: who needs which, and what a rank holds of them. Pure NumPy.

    own = Stretches.of(trees)                                   # what this rank's engine sampled
    wants = wanted(segments, dealt, home_of_tree)               # the same on every rank
    contents = own.take(wants.of(replica=3, home=own_number))                   # what it sends to replica 3
    pieces = arrived.furnish(segments)                          # segments whose tokens can be read

An *address* counts the tokens of all nodes of the trees in the order given, as `Segments.source` does. A *stretch* is
(first address, length). A *replica* is a data-parallel rank: all ranks that compute its packs together. A *home* is the
engine that sampled a tree. Structure alone says who needs what, so no request is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from treepo_mega.errors import TreepoError
from treepo_mega.tree.deal import Dealt, ranges
from treepo_mega.tree.elsewhere import is_here
from treepo_mega.tree.node import Tree
from treepo_mega.tree.routing import ExpertIds, ids_of, joined, no_experts
from treepo_mega.tree.segments import Floats, Ints, Segments

EVERYWHERE = -1
"""Home of a tree whose contents every rank holds."""
ABSENT = 1 << 62
"""The source of a segment whose tokens are not held: NumPy refuses it as an index."""


class StretchMissing(TreepoError):
    """Tokens were asked of a rank that does not hold them: its plan is not the others'."""


class Contents(NamedTuple):
    """Tokens of some stretches, one after the other."""

    tokens: Ints
    logprobs: Floats
    experts: ExpertIds
    """[as long as `tokens`, layers, top_k]; [.., 0, 0] where trees carry none."""

    def part(self, begin: int, end: int) -> Contents:
        """The tokens `begin` .. `end` - 1."""
        return Contents(self.tokens[begin:end], self.logprobs[begin:end], self.experts[begin:end])


@dataclass(frozen=True, slots=True)
class Wants:
    """W stretches, each needed by one replica; by replica, then home, then address."""

    replica: Ints
    home: Ints
    start: Ints
    length: Ints

    def of(self, *, replica: int, home: int | None = None) -> Wants:
        """Those of one replica, and of one home if it is given."""
        chosen = self.replica == replica
        if home is not None:
            chosen &= self.home == home
        return Wants(self.replica[chosen], self.home[chosen], self.start[chosen], self.length[chosen])

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return int(self.length.sum())


def wanted(segments: Segments, dealt: Dealt, home_of_tree: Ints) -> Wants:
    """What each replica needs for its pieces, every stretch once.

    `home_of_tree` [trees]: by the numbers that `Segments.prompt` gives the trees.
    """
    pieces = dealt.pieces
    replica_of_piece = np.empty(len(pieces.tokens), np.int64)
    for replica, chosen in enumerate(dealt.per_rank):
        replica_of_piece[chosen] = replica
    segment = pieces.segment_of_entry
    replica_of_entry = replica_of_piece[pieces.piece_of_entry]
    home_of_entry = home_of_tree[segments.prompt[segments.group[segment]]]
    start = segments.source[segment]
    length = segments.length[segment]
    order = np.lexsort((start, home_of_entry, replica_of_entry))
    order = order[length[order] > 0]
    # Pieces of a cut tree repeat their ancestors, and copies of a node refer to the same tokens.
    again = np.zeros(len(order), np.bool_)
    again[1:] = (np.diff(start[order]) == 0) & (np.diff(replica_of_entry[order]) == 0)
    order = order[~again]
    return Wants(replica_of_entry[order], home_of_entry[order], start[order], length[order])


@dataclass(slots=True)
class Stretches:
    """K stretches that are here, one after the other in `tokens` and `logprobs`."""

    start: Ints
    """[K] address of each, ascending."""
    length: Ints
    """[K] tokens."""
    at: Ints
    """[K] index of its first token in `tokens`."""
    tokens: Ints
    logprobs: Floats
    """nats; 0 for prompts."""
    experts: ExpertIds
    """[as long as `tokens`, layers, top_k]; [.., 0, 0] where trees carry none."""

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Stretches:
        """The nodes of `trees` whose contents are here."""
        nodes = [node for tree in trees for node in tree.nodes]
        lengths = np.fromiter((len(node.tokens) for node in nodes), np.int64, len(nodes))
        address = np.cumsum(lengths) - lengths
        held = np.fromiter((is_here(node.tokens) for node in nodes), np.bool_, len(nodes)) & (lengths > 0)
        chosen = [nodes[index] for index in np.flatnonzero(held).tolist()]
        length = lengths[held]
        size = int(length.sum())
        # A root may carry logprobs in a hand-made tree; prompts are not trained.
        scores = ([0.0] * len(node.tokens) if node.parent < 0 else node.logprobs for node in chosen)
        return cls(
            start=address[held],
            length=length,
            at=np.cumsum(length) - length,
            # An iterator and not an array a node: a third less time.
            tokens=np.fromiter(chain.from_iterable(node.tokens for node in chosen), np.int64, size),
            logprobs=np.fromiter(chain.from_iterable(scores), np.float64, size),
            experts=ids_of(chosen, length),
        )

    @classmethod
    def arrived(cls, wants: Wants, contents: Contents) -> Stretches:
        """What `wants` names, whose contents lie in that order."""
        order = np.argsort(wants.start, kind="stable")
        at = np.cumsum(wants.length) - wants.length
        return cls(wants.start[order], wants.length[order], at[order], *contents)

    def take(self, wants: Wants) -> Contents:
        """Contents of the stretches `wants`, one after the other. Raises StretchMissing."""
        begin, held = self._find(wants.start, wants.length)
        if not held.all():
            missing = int(np.flatnonzero(~held)[0])
            raise StretchMissing(
                f"{wants.length[missing]} tokens from address {wants.start[missing]} on are not held here: ranks have "
                "planned the step differently. Do they run the same version with the same configuration?"
            )
        index = ranges(begin, begin + wants.length)
        return Contents(self.tokens[index], self.logprobs[index], self.experts[index])

    def furnish(self, segments: Segments) -> Segments:
        """`segments` with what is held of their tokens; reading others is an IndexError."""
        begin, held = self._find(segments.source, segments.length)
        source = np.where(held, begin, ABSENT)
        return replace(segments, source=source, tokens=self.tokens, logprobs=self.logprobs, experts=self.experts)

    def _find(self, start: Ints, length: Ints) -> tuple[Ints, np.ndarray]:
        """Index of each first token in `tokens`, and whether the whole stretch is held. No tokens are held anywhere."""
        place = np.searchsorted(self.start, start, side="right") - 1
        known = place >= 0
        place = np.maximum(place, 0)
        if not len(self.start):
            return np.zeros(len(start), np.int64), length == 0
        held = known & (start + length <= self.start[place] + self.length[place])
        begin = self.at[place] + start - self.start[place]
        return np.where(length > 0, begin, 0), held | (length == 0)


def _joined(parts: Sequence[Contents]) -> Contents:
    """The tokens of all parts, one after the other."""
    if not parts:
        return Contents(np.zeros(0, np.int64), np.zeros(0), no_experts())
    tokens = np.concatenate([part.tokens for part in parts])
    return Contents(tokens, np.concatenate([part.logprobs for part in parts]), joined([part.experts for part in parts]))


@dataclass(slots=True)
class Deliveries:
    """The tokens of all optimizer steps of a rollout: from homes to replicas, one parcel a pair. The same on all ranks.

    A parcel holds, step by step, the stretches of `Wants` in their order: all tokens, all logprobs, then all experts.
    """

    wants: list[Wants]
    """By optimizer step."""

    def tokens_between(self, replicas: int, homes: int) -> Ints:
        """[replicas, homes] tokens of each parcel; what is everywhere is not sent."""
        sums = np.zeros((replicas, homes), np.int64)
        for of_step in self.wants:
            sent = of_step.home >= 0
            pair = of_step.replica[sent] * homes + of_step.home[sent]
            sums += np.bincount(pair, of_step.length[sent], replicas * homes).astype(np.int64).reshape(sums.shape)
        return sums

    def contents(self, own: Sequence[Stretches], replica: int, home: int) -> Contents:
        """What is in the parcel from `home`, which holds `own` (by step), to `replica`."""
        steps = zip(own, self.wants, strict=True)
        return _joined([held.take(of_step.of(replica=replica, home=home)) for held, of_step in steps])

    def assemble(self, replica: int, parcels: dict[int, Contents]) -> list[Stretches]:
        """By step, what `replica` holds once it has the `contents` of every home."""
        at = dict.fromkeys(parcels, 0)
        out = []
        for of_step in self.wants:
            own = of_step.of(replica=replica)
            parts = []
            # Ascending, as the stretches are.
            for home in np.unique(own.home).tolist():
                begin = at[home]
                at[home] += int(own.length[own.home == home].sum())
                parts.append(parcels[home].part(begin, at[home]))
            out.append(Stretches.arrived(own, _joined(parts)))
        return out
