"""Sums along the paths and over the subtrees of a forest given by the parent of each entry. Pure NumPy.

Parents come before their children, and -1 is above a root. No Python loop over entries: one pass per level.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def levels(parent: Ints) -> list[Ints]:
    """Indices by depth: roots, their children, and so on."""
    # Pointer jumping: `depth` counts the steps to `ancestor`, and each pass doubles how far that one is.
    depth = (parent >= 0).astype(np.int64)
    ancestor = np.where(parent >= 0, parent, np.arange(len(parent)))
    while depth[ancestor].any():
        depth += depth[ancestor]
        ancestor = ancestor[ancestor]
    # Stable: within a level, indices stay ascending, and sums over them have one order.
    by_depth = np.argsort(depth, kind="stable")
    return np.split(by_depth, np.cumsum(np.bincount(depth, minlength=1))[:-1])


def path_sums(parent: Ints, value: npt.NDArray) -> npt.NDArray:
    """[S] sum of `value` from the root to each segment, itself included; of `value`'s dtype."""
    # Pointer jumping, as in `levels`; entry S is an ancestor of the roots, of value 0, where everything ends.
    above_roots = len(parent)
    total = np.append(value, np.zeros(1, value.dtype))
    ancestor = np.append(np.where(parent >= 0, parent, above_roots), above_roots)
    while (ancestor < above_roots).any():
        total = total + total[ancestor]
        ancestor = ancestor[ancestor]
    return total[:-1]


def subtree_sums(parent: Ints, value: npt.NDArray, by_level: list[Ints]) -> npt.NDArray:
    """[S] sum of `value` over each subtree, from the deepest level up."""
    total = value.copy()
    for level in by_level[:0:-1]:
        # `total[parent[level]] += ...` would add one child of each parent only.
        np.add.at(total, parent[level], total[level])
    return total


def preorder(parent: Ints, below: Ints, by_level: list[Ints]) -> Ints:
    """[S] rank of each segment in depth-first pre-order: roots in index order, and siblings in index order."""
    # Sorted by parent, siblings stand together; what precedes a segment in its family is a difference of sums.
    by_family = np.argsort(parent, kind="stable")
    parent_by_family = parent[by_family]
    sum_by_family = np.cumsum(below[by_family]) - below[by_family]
    eldest_by_family = np.searchsorted(parent_by_family, parent_by_family)
    elder = np.empty(len(parent), np.int64)
    elder[by_family] = sum_by_family - sum_by_family[eldest_by_family]
    rank = np.empty(len(parent), np.int64)
    rank[by_level[0]] = elder[by_level[0]]
    for level in by_level[1:]:
        rank[level] = rank[parent[level]] + 1 + elder[level]
    return rank
