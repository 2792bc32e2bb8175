"""Tokens that siblings sampled alike, kept once: the trie of a tree's responses. Pure NumPy.

    segments, credit = merge_equal(segments, credit)
    merged = merge(segments)                    # the same in two steps: weights of leaves may change in between
    credit = merged.credit(lesson.credit())

Two paths of a tree that begin with the same tokens have the same hidden states and logprobs there, whether the sampler
shared them or drew them twice. Their clipped terms add up in the masses as those of a shared segment do, so the loss
and its gradient stay what they were. A peaked policy draws most of its siblings alike; then most of a forest goes.

    before                          after
    root -+- 1: a b c               root --- a b -+- c
          `- 2: a b d                             `- d        mass of `a b`: that of 1 plus that of 2

Equal prefixes are found by a hash of each prefix: the sum of a 64-bit mix of (token, position) over it. Every merge is
compared token by token afterwards. A collision (a chance of 1e-5 in a step of 20 million tokens) is met with another
hash, so it never gives a wrong gradient. Linear in tokens, but for one sort of them.

Tokens are compared where they are (`compare`, a tree at a time). Other ranks are told which parts of which nodes are
equal, and merge the structure alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from treepo_mega.errors import TreepoError
from treepo_mega.tree.alike import Alike
from treepo_mega.tree.credit import Credit
from treepo_mega.tree.deal import ranges
from treepo_mega.tree.history import count_parts
from treepo_mega.tree.node import Tree
from treepo_mega.tree.segments import Segments, arrange
from treepo_mega.tree.sums import Ints, path_sums

Hashes = npt.NDArray[np.uint64]


SALTS = range(4)
"""Hashes that are tried one after the other."""


class MergeError(TreepoError):
    """Two different prefixes had one hash under every salt, which is no chance: the arrays are damaged."""


@dataclass(frozen=True, slots=True)
class Atoms:
    """The tokens of a forest in indivisible runs: what begins with one token of an atom has the whole of it.

    A atoms, those of a segment one after the other, segments ascending. A token is an atom of length 1.
    """

    segment: Ints
    """[A] its segment."""
    offset: Ints
    """[A] tokens of the segment before it."""
    length: Ints
    """[A] tokens."""
    first: Ints
    """[A] the first atom with the same prefix, which names the prefix."""
    above: Ints
    """[A] `first` of the atom before it on its path; -1 for the first of a root."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The trie of a forest, and what of the forest went into each of its segments."""

    segments: Segments
    """S of them. Leaves keep the caller's numbers, so what is summed along paths by these segments is by leaf the same
    as by those from before."""
    source: Ints
    """[P] a segment from before, of each part of one that stayed whole."""
    target: Ints
    """[P] the segment of the trie that the part went into."""
    origin: Segments
    """The forest from before."""

    def credit(self, credit: Credit) -> Credit:
        """Of each segment of the trie, from that of the segments before: the sum over what was merged into it."""

        def summed(values: npt.NDArray) -> npt.NDArray:
            return np.bincount(self.target, values[self.source], len(self.segments))

        count = summed(credit.count).astype(np.int64)
        return Credit(summed(credit.A_pos), summed(credit.A_neg), summed(credit.n), count)

    def leaf_sums(self, value: npt.NDArray) -> npt.NDArray:
        """[L] sum of `value`, one a segment of the trie, over each trajectory; in the caller's order of leaves."""
        if self.origin.ends is None:
            return self.segments.leaf_sums(value)
        # Behind unlike hidden turns equal contexts were merged: only the forest from before knows its trajectories.
        of_origin = np.bincount(self.source, value[self.target], len(self.origin))
        return self.origin.leaf_sums(of_origin)


def merge_equal(segments: Segments, credit: Credit, alike: Alike | None = None) -> tuple[Segments, Credit]:
    """The segments of `merge`, and the credit of each of them."""
    merged = merge(segments, alike)
    return merged.segments, merged.credit(credit)


def merge(segments: Segments, alike: Alike | None = None) -> Merged:
    """The trie of every group.

    Leaves keep their numbers; `Segments.node` names the first of the merged nodes. Prompts are not merged between
    groups. `alike`: what the ranks that have the tokens say of them; None: the tokens are here, and are compared. Both
    give the same. Raises MergeError where every hash collides, and where `alike` is of other nodes.
    """
    if not len(segments):
        return Merged(segments, np.zeros(0, np.int64), np.zeros(0, np.int64), segments)
    atoms = _compared(segments) if alike is None else _told(segments, alike)
    merged = np.bincount(atoms.first, minlength=len(atoms.first))
    begins = np.bincount(atoms.first, atoms.offset == 0, len(atoms.first)) > 0
    is_kept = atoms.first == np.arange(len(atoms.first))
    above = atoms.above
    # A run goes on while the same segments share it: none has left, and none has begun.
    opens = is_kept & (begins | (above < 0) | (merged != merged[np.maximum(above, 0)]))
    # A kept atom that opens no run follows its neighbour: the same segments share both, and the first names both.
    run_of_atom = np.cumsum(opens) - 1
    opening = np.flatnonzero(opens)
    origin = atoms.segment[opening]
    end_of_leaf = _last_atom(segments, atoms.segment)[segments.leaf_segment]
    leaves = np.empty(len(end_of_leaf), np.int64)
    leaves[segments.leaf_number] = run_of_atom[atoms.first[end_of_leaf]]
    built, run_of_segment = arrange(
        parent=np.where(above[opening] >= 0, run_of_atom[np.maximum(above[opening], 0)], -1),
        leaves=leaves,
        length=np.bincount(run_of_atom[is_kept], atoms.length[is_kept], len(opening)).astype(np.int64),
        source=segments.source[origin] + atoms.offset[opening],
        node=segments.node[origin],
        trained=segments.trained[origin],
        prompt=segments.prompt[segments.group[origin]],
        tokens=segments.tokens,
        logprobs=segments.logprobs,
        # Of tokens that were sampled alike, those of the first: the others were computed in other batches.
        experts=segments.experts,
    )
    # Every atom of a run has the same segments merged into it, so its first one speaks for all.
    speaks = opens[atoms.first]
    segment_of_run = np.empty(len(opening), np.int64)
    segment_of_run[run_of_segment] = np.arange(len(run_of_segment))
    # What trajectories say is no tree any more, where contexts behind unlike turns are one.
    built.ends = segments.ends
    return Merged(built, atoms.segment[speaks], segment_of_run[run_of_atom[atoms.first[speaks]]], segments)


def compare(tree: Tree) -> Alike:
    """Compare the tokens of a tree, which are here. Raises MergeError."""
    segments = Segments.from_trees([tree], [0])
    if not len(segments):
        return Alike(np.zeros(count_parts(tree), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    tokens = _compared(segments)
    merged = np.bincount(tokens.first, minlength=len(tokens.first))
    begins = np.bincount(tokens.first, tokens.offset == 0, len(tokens.first)) > 0
    before = np.maximum(np.arange(len(tokens.first)) - 1, 0)
    # What the same segments share from the same token on, none of them begins or leaves within.
    opens = (tokens.offset == 0) | begins[tokens.first]
    opens |= merged[tokens.first] != merged[tokens.first[before]]
    opening = np.flatnonzero(opens)
    part_of_atom = segments.part[tokens.segment[opening]]
    # By node, as the trees of a forest are told; within a node the order stays.
    order = np.argsort(part_of_atom, kind="stable")
    return Alike(
        atoms=np.bincount(part_of_atom, minlength=count_parts(tree)).astype(np.int64),
        length=np.diff(opening, append=len(opens))[order],
        name=np.unique(tokens.first[opening], return_inverse=True)[1].reshape(-1)[order],
    )


def told_alike(trees: Sequence[Tree]) -> Alike | None:
    """What is known of equal tokens in `trees`; None where every rank holds all tokens, and compares them itself."""
    if all(tree.home is None for tree in trees):
        return None
    return Alike.joined([tree.alike or compare(tree) for tree in trees])


def _told(segments: Segments, alike: Alike) -> Atoms:
    """The atoms of `segments`, whose nodes are numbered as in `alike`."""
    part = segments.part
    count = alike.atoms[part]
    end_of_part = np.cumsum(alike.atoms)
    index = ranges((end_of_part - alike.atoms)[part], end_of_part[part])
    segment = np.repeat(np.arange(len(segments)), count)
    length = alike.length[index]
    held = np.bincount(segment, length, len(segments)).astype(np.int64)
    if (wrong := np.flatnonzero(held != segments.length)).size:
        raise MergeError(
            f"{held[wrong[0]]} tokens of node {segments.node[wrong[0]]} were compared, and it has "
            f"{segments.length[wrong[0]]}: what was told of equal tokens is of another forest"
        )
    before_atom = np.cumsum(length) - length
    start_of_segment = np.cumsum(segments.length) - segments.length
    offset = before_atom - start_of_segment[segment]
    # Of the atoms with one name, the first in this order: as the first token with a prefix does.
    _, first_of_name, name = np.unique(alike.name[index], return_index=True, return_inverse=True)
    first = first_of_name[name.reshape(-1)]
    before = _atom_before(segments, segment, offset)
    return Atoms(segment, offset, length, first, np.where(before >= 0, first[np.maximum(before, 0)], -1))


def _compared(segments: Segments) -> Atoms:
    """Every token an atom. Raises MergeError."""
    segment = np.repeat(np.arange(len(segments)), segments.length)
    offset = np.arange(len(segment)) - (np.cumsum(segments.length) - segments.length)[segment]
    # What the policy said and what an environment said are never the same row, whatever the tokens.
    identity = 2 * segments.tokens[segments.source[segment] + offset] + segments.trained[segment]
    before = _atom_before(segments, segment, offset)
    for salt in SALTS:
        key = _prefix_hashes(segments, segment, offset, identity, salt)
        _, first_of_prefix, prefix_of_token = np.unique(key, return_index=True, return_inverse=True)
        # The first token with a prefix names it: then parents come before their children.
        first = first_of_prefix[prefix_of_token]
        above = np.where(before >= 0, first[np.maximum(before, 0)], -1)
        # Equal hashes are equal prefixes if the last tokens are equal and what is above them was merged, too.
        if (identity == identity[first]).all() and (above == above[first]).all():
            return Atoms(segment, offset, np.ones(len(segment), np.int64), first, above)
    raise MergeError(
        f"{len(SALTS)} hashes in a row confused two prefixes of {len(segment)} tokens; set train.prefix_sharing=tree"
    )


def _prefix_hashes(
    segments: Segments, segment_of_token: Ints, offset_of_token: Ints, id_of_token: Ints, salt: int
) -> Hashes:
    """[T] a hash of the path down to each token, its group included."""
    position = segments.position[segment_of_token] + offset_of_token
    mixed = _mix(_mix(id_of_token.astype(np.uint64) + np.uint64(salt << 40)) + position.astype(np.uint64))
    running = np.cumsum(mixed, dtype=np.uint64)
    # Sums of uint64 wrap around, and differences of wrapped sums are right all the same.
    before_segment = np.concatenate([[np.uint64(0)], running])[np.cumsum(segments.length) - segments.length]
    own = np.concatenate([[np.uint64(0)], running])[np.cumsum(segments.length)] - before_segment
    above = path_sums(segments.parent, own.view(np.int64)).view(np.uint64) - own
    within = running - before_segment[segment_of_token]
    group = _mix(segments.group.astype(np.uint64) + np.uint64(1))
    return above[segment_of_token] + within + group[segment_of_token]


def _mix(value: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    mixed = value + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _last_atom(segments: Segments, segment_of_atom: Ints) -> Ints:
    """[S] the last atom at or above the end of each segment; a root has one, so there always is one."""
    holder = np.arange(len(segments))
    # A segment of no tokens ends where the next one up that has tokens ends.
    while (empty := segments.length[holder] == 0).any():
        holder = np.where(empty, segments.parent[holder], holder)
    return np.searchsorted(segment_of_atom, holder, side="right") - 1


def _atom_before(segments: Segments, segment_of_atom: Ints, offset_of_atom: Ints) -> Ints:
    """[A] the atom before each one on its path; -1 for the first of a root."""
    last = _last_atom(segments, segment_of_atom)
    parent = segments.parent[segment_of_atom]
    end_of_parent = np.where(parent >= 0, last[np.maximum(parent, 0)], -1)
    return np.where(offset_of_atom > 0, np.arange(len(segment_of_atom)) - 1, end_of_parent)
