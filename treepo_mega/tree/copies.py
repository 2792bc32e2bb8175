"""Which parts of a forest's nodes are laid out, and how often: once each, or once a trajectory. Pure NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from treepo_mega.tree.history import contexts_end
from treepo_mega.tree.sums import Ints, levels, path_sums

Sharing = Literal["tree", "prompt", "none"]


@dataclass(slots=True)
class Copies:
    """C segments, each a copy of a part of a node; parents come before their children."""

    part_of_copy: Ints
    parent_of_copy: Ints
    """[C] copy, -1 for a root."""
    before_of_copy: Ints
    """[C] copy before it in its trajectories, -1 for a root: the parent, unless turns are hidden."""
    copy_of_leaf: Ints
    """[L] the copy at which each leaf ends."""


def copies_of(parent_of_part: Ints, before_of_part: Ints, leaves: Ints, sharing: Sharing) -> Copies:
    """The copies that `sharing` makes (`Segments.from_trees`). Raises ValueError for an unknown one."""
    if sharing == "tree":
        return Copies(np.arange(len(parent_of_part)), parent_of_part, before_of_part, leaves)
    if sharing not in ("prompt", "none"):
        raise ValueError(f"prefix sharing {sharing!r}: expected tree, prompt or none")
    ancestors = _ancestors(before_of_part, leaves)
    size_of_leaf = (ancestors >= 0).sum(0)
    first_of_leaf = np.cumsum(size_of_leaf) - size_of_leaf
    # A copy for each (trajectory, part on it): one trajectory after the other, in each the root first, the leaf last.
    leaf_of_copy = np.repeat(np.arange(len(leaves)), size_of_leaf)
    depth_of_copy = np.arange(int(size_of_leaf.sum())) - first_of_leaf[leaf_of_copy]
    part_of_copy = ancestors[size_of_leaf[leaf_of_copy] - 1 - depth_of_copy, leaf_of_copy]
    before_of_copy = np.where(depth_of_copy > 0, np.arange(len(part_of_copy)) - 1, -1)
    parent_of_copy = before_of_copy
    if parent_of_part is not before_of_part:
        # What a copy sees last is further up in the same trajectory.
        depth_of_part = path_sums(before_of_part, np.ones(len(before_of_part), np.int64)) - 1
        seen = np.maximum(parent_of_part[part_of_copy], 0)
        parent_of_copy = np.where(depth_of_copy > 0, first_of_leaf[leaf_of_copy] + depth_of_part[seen], -1)
    copies = Copies(part_of_copy, parent_of_copy, before_of_copy, first_of_leaf + size_of_leaf - 1)
    return _one_root_each(copies, len(parent_of_part)) if sharing == "prompt" else copies


def _ancestors(parent_of_part: Ints, leaves: Ints) -> Ints:
    """[D, L] the part d steps above each leaf (row 0: the leaf itself), -1 above its root."""
    # Climb from all leaves at once, until every one is above its root.
    rows = [leaves]
    while (rows[-1] >= 0).any():
        rows.append(np.where(rows[-1] >= 0, parent_of_part[rows[-1]], -1))
    return np.stack(rows[:-1]) if len(leaves) else np.zeros((1, 0), np.int64)


def _one_root_each(copies: Copies, parts: int) -> Copies:
    """The same copies with one root per tree: the first trajectory's, which the others' paths now hang from."""
    copy = np.arange(len(copies.part_of_copy))
    is_root = copies.parent_of_copy < 0
    # Assigning from the last to the first leaves each root with its first copy, which precedes all that use it.
    first_copy_of_part = np.full(parts, -1, np.int64)
    first_copy_of_part[copies.part_of_copy[is_root][::-1]] = np.flatnonzero(is_root)[::-1]
    stand_in_of_copy = np.where(is_root, first_copy_of_part[copies.part_of_copy], copy)
    kept = stand_in_of_copy == copy
    kept_of_copy = (np.cumsum(kept) - 1)[stand_in_of_copy]

    def kept_only(above: Ints) -> Ints:
        return np.where(above >= 0, kept_of_copy[np.maximum(above, 0)], -1)[kept]

    return Copies(
        part_of_copy=copies.part_of_copy[kept],
        parent_of_copy=kept_only(copies.parent_of_copy),
        before_of_copy=kept_only(copies.before_of_copy),
        copy_of_leaf=kept_of_copy[copies.copy_of_leaf],
    )


def ends_of(copies: Copies) -> tuple[Ints, Ints]:
    """Where the contexts of some copies end: [E] the copy, first those of leaves, then turns hidden from what follows.

    And [E] the first trajectory that has each end.
    """
    by_level = levels(copies.before_of_copy)
    leaves = len(copies.copy_of_leaf)
    first = np.full(len(copies.part_of_copy), leaves, np.int64)
    first[copies.copy_of_leaf] = np.arange(leaves)
    for level in by_level[:0:-1]:
        np.minimum.at(first, copies.before_of_copy[level], first[level])
    hidden = contexts_end(copies.parent_of_copy, copies.copy_of_leaf, first < leaves)
    at = np.concatenate([copies.copy_of_leaf, hidden])
    return at, first[at]
