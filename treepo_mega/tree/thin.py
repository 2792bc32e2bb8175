"""Fewer leaves for the update: chosen by how much they teach, and weighed by how often they are chosen. Pure NumPy.

    fewer = thin(trees, [0, 1], values, counts, share=0.4, start=0.7)
    fewer.trees, fewer.values, fewer.counts              # instead of the trees, advantages and counts of the step

An update costs several times what sampling costs, and most leaves teach little: under a reward that few answers get,
the wrong ones all say nearly the same. So leaf i trains with probability

    pi_i = min(1, s (|A_i| + a / 10) c_i)     a: the mean |A|; sum of pi_i = share x leaves, which decides s

and then counts c_i / pi_i. The expectation of the sums in loss and gradient over the choice is that of all leaves
(Horvitz and Thompson, 1952), and in proportion to |A_i| alone no rule of so many leaves has less variance where their
gradients are equally long. The tenth bounds the weights (a defensive mixture: Hesterberg, 1995), and lets leaves
without advantage stand for their like in KL and entropy. Baselines are those of all leaves. Where advantages are per
node, |A_i| is the mean over the tokens of the path. Rules that keep the best and the worst leaves and weigh them alike
(PODS, Xu et al., 2025) train another objective.

The choice is systematic: one random number in [0, 1) for the whole step, and then evenly spaced along the leaves. So
the number of leaves is fixed, and siblings are rarely all taken or all left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mega.tree.node import Tree
from treepo_mega.tree.segments import Bools, Floats

DEFENCE = 0.1
"""Of the mean advantage, what every leaf is chosen by at least: no weight exceeds 11 / share times the mean."""


@dataclass(frozen=True, slots=True)
class Thinned:
    """What an optimizer step trains on; trees that have lost all their leaves are left out."""

    trees: list[Tree]
    prompts: list[int]
    """The number of each tree's prompt, as it was given."""
    values: list[Floats]
    """Advantages, per leaf of the trees above or per node, as they were given."""
    counts: Floats
    """[L] what each leaf counts, tree by tree: what it counted / its chance of being here."""


def thin(
    trees: Sequence[Tree],
    prompts: Sequence[int],
    values: Sequence[Floats],
    counts: Sequence[float] | None,
    *,
    share: float,
    start: float,
) -> Thinned:
    """Those of the leaves of one optimizer step that train.

    Args:
        trees: Graded trees, all with leaves.
        prompts: The number of each tree's prompt.
        values: Advantages of each tree, one a leaf or one a node.
        counts: [L] what each leaf counts, tree by tree. None: all alike.
        share: Of the leaves, how many train; in (0, 1]. At least one does; all do if none has an advantage.
        start: In [0, 1): decides the choice.
    """
    plain = np.ones(sum(len(tree.leaves) for tree in trees)) if counts is None else np.array(counts, np.float64)
    advantage = np.concatenate([_of_leaves(tree, of_tree) for tree, of_tree in zip(trees, values, strict=True)])
    mean = float((plain * advantage).sum() / plain.sum())
    size = plain * (advantage + DEFENCE * mean)
    chance = chances(size, max(1.0, round(share * len(size)))) if size.any() else np.ones(len(size))
    kept = chosen(chance, start)
    weight = plain / np.where(kept, chance, 1.0)
    out = Thinned([], [], [], weight[kept])
    first = 0
    for tree, prompt, of_tree in zip(trees, prompts, values, strict=True):
        here = np.flatnonzero(kept[first : first + len(tree.leaves)])
        first += len(tree.leaves)
        if len(here):
            per_node = len(of_tree) == len(tree.nodes)
            out.trees.append(tree.only(here.tolist()))
            out.prompts.append(prompt)
            out.values.append(of_tree if per_node else of_tree[here])
    return out


def chances(size: Floats, wanted: float) -> Floats:
    """[L] in proportion to `size` [L] >= 0, at most 1, with the sum `wanted` or the number of sizes above 0.

    >>> chances(np.array([8.0, 1.0, 1.0, 2.0, 0.0]), 3.0).tolist()
    [1.0, 0.5, 0.5, 1.0, 0.0]
    """
    certain = np.zeros(len(size), bool)
    while True:
        left = np.where(certain, 0.0, size)
        total = left.sum()
        scale = (wanted - certain.sum()) / total if total > 0 else 0.0
        more = left * scale >= 1
        if not more.any():
            return np.where(certain, 1.0, left * scale)
        certain |= more


def chosen(chance: Floats, start: float) -> Bools:
    """[L] whether each leaf trains: with its `chance`, as evenly along the leaves as can be.

    >>> chosen(np.array([1.0, 0.5, 0.5, 1.0, 0.0]), 0.7).tolist()
    [True, False, True, True, False]
    """
    uncertain = np.where(chance < 1, chance, 0.0)
    passed = np.floor(np.cumsum(uncertain) - start)
    return (chance >= 1) | (np.diff(passed, prepend=np.floor(-start)) > 0)


def _of_leaves(tree: Tree, values: Floats) -> Floats:
    """[leaves] |advantage| of each leaf; per node: the mean over the tokens of its path."""
    if len(values) != len(tree.nodes):
        return np.abs(values)
    length = np.array([0, *(len(node.tokens) for node in tree.nodes[1:])], np.float64)
    paths = [tree.ancestry(leaf) for leaf in tree.leaves]
    return np.array([(length[path] * np.abs(values[path])).sum() / max(1.0, length[path].sum()) for path in paths])
