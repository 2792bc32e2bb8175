"""What a leaf counts: every leaf alike, or by the chance that a random descent ends in it. Pure Python.

    tree = fair_leaves(tree)                # without leaves of a fallback, or of forks by rank
    shares = descent_shares(tree)           # one a leaf, in the order of tree.leaves; they add up to 1

Leaves of a tree are no fair sample of the policy once paths may end early: a path that goes on becomes several
leaves, so long responses are counted more often than the policy gives them. A *descent* starts at the root and
draws a child uniformly at every node. It ends as an independent sample of the policy ends, because children are
drawn from the policy, and because how many there are is decided before any of them is sampled. So leaf i counts

    p_i = product over the nodes of its path of 1 / (siblings with a leaf at or below them, itself included)

and the sum of p_i f(leaf_i) has the policy's mean of f as its expectation, for every budget and transfer rule. The
policy gradient of `sum p_i (R_i - b)` is exact in the same sense (`tools/bench/estimators.py` measures both). Where a
sibling was cut because it repeats this one (`tree/look_alikes.py`), its draw counts for it (`Node.weight`).

A fallback breaks the argument: it goes where paths *have ended*. Its leaves have p = 0. Counting them shifts the mean
reward of the bench's process by 0.006 under `transfer: level` and by 0.026 under `quota`. So do forks by rank
(`tree/fork.py`); their trunks are independent. Forks by a threshold do not: a path's first token above it is known
before the token is drawn. Where branches avoid each other's tokens (`fork.draw: other`), they count by `Node.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

from treepo_mega.tree.node import Tree

LeafWeight = Literal["uniform", "descent"]


def fair_leaves(tree: Tree) -> Tree:
    """The tree with the leaves alone that are fair samples; nodes are shared with `tree`, rewards are kept in order.

    >>> tree = Tree.start("p", [1])
    >>> tree.leaves = [tree.add_child(0).id, tree.add_child(0, fallback=True).id]
    >>> tree.rewards = [1.0, 0.0]
    >>> fair = fair_leaves(tree)
    >>> fair.leaves, fair.rewards
    ([1], [1.0])
    """
    fair = [
        index
        for index, leaf in enumerate(tree.leaves)
        # The whole path: only the nodes that a fallback or a fork made are marked, not what comes below them.
        if not any(tree.nodes[node].fallback or tree.nodes[node].fork == "rank" for node in tree.ancestry(leaf))
    ]
    return tree.only(fair)


def descent_shares(tree: Tree) -> list[float]:
    """p_i of every leaf, in the order of `tree.leaves`; they add up to 1. Children without a leaf below do not count.

    >>> tree = Tree.start("p", [1])
    >>> first = tree.add_child(0)
    >>> tree.leaves = [first.id, *(tree.add_child(tree.add_child(0).id).id for _ in range(1))]
    >>> descent_shares(tree)
    [0.5, 0.5]
    """
    # Children may have lost all their leaves (ungraded, cut off): counting them would give shares to nobody.
    counted = set(tree.leaves_below())
    weights = {
        node: math.fsum(tree.nodes[child].weight for child in tree.nodes[node].children if child in counted)
        for node in counted
    }
    shares = []
    for leaf in tree.leaves:
        share = 1.0
        for parent, child in pairwise(tree.ancestry(leaf)):
            share *= tree.nodes[child].weight / weights[parent]
        shares.append(share)
    return shares


def leaf_shares(tree: Tree, leaf_weight: str) -> list[float] | None:
    """The shares that `algo.leaf_weight` names; None: every leaf alike, which callers then compute without weights.

    Raises ValueError for an unknown name.
    """
    if leaf_weight not in get_args(LeafWeight):
        raise ValueError(f"leaf_weight {leaf_weight!r}: expected one of {', '.join(get_args(LeafWeight))}")
    return descent_shares(tree) if leaf_weight == "descent" else None


def leaf_counts(trees: Sequence[Tree], leaf_weight: str, tree_weight: str) -> list[float] | None:
    """What each leaf counts in the loss, tree by tree: `leaf_weight` within a tree, `tree_weight` beside other trees.

    None: every leaf alike. The unit does not matter. Both are those of `algo`.

    >>> tree = Tree.start("p", [1])
    >>> tree.leaves = [tree.add_child(0).id, tree.add_child(0).id]
    >>> leaf_counts([tree, tree.only([0])], "uniform", "prompt")
    [0.5, 0.5, 1.0]
    """
    by_tree = [leaf_shares(tree, leaf_weight) for tree in trees]
    if tree_weight != "prompt" and leaf_weight == "uniform":
        return None
    counts: list[float] = []
    for tree, shares in zip(trees, by_tree, strict=True):
        width = len(tree.leaves)
        # Shares of a tree add up to 1: by themselves they count a tree as one, whether it has all its leaves or not.
        of_leaf = shares or [1 / width] * width
        counts += [share * width for share in of_leaf] if tree_weight == "leaves" else of_leaf
    return counts


def policy_mean(trees: Sequence[Tree], value: Callable[[Tree, int], float]) -> float:
    """Estimate of the policy's mean of `value(tree, index of the leaf)`: prompts count alike, leaves by their shares.

    Unbiased for every sampler, so that runs with trees, with independent samples and with other budgets compare.
    Trees without a fair leaf are left out; without any tree it is 0.

    >>> tree = Tree.start("p", [1])
    >>> parent = tree.add_child(0).id
    >>> tree.leaves = [tree.add_child(0).id, tree.add_child(parent).id, tree.add_child(parent).id]
    >>> tree.rewards = [1.0, 0.0, 0.0]
    >>> policy_mean([tree], lambda tree, index: tree.rewards[index])
    0.5
    """
    return policy_means(trees, value)[0]


def policy_means(trees: Sequence[Tree], *values: Callable[[Tree, int], float]) -> list[float]:
    """`policy_mean` of each of `values`."""
    means: list[list[float]] = [[] for _ in values]
    for tree in map(fair_leaves, trees):
        if tree.leaves:
            shares = descent_shares(tree)
            for of_trees, value in zip(means, values, strict=True):
                of_trees.append(math.fsum(share * value(tree, index) for index, share in enumerate(shares)))
    return [math.fsum(of_trees) / max(1, len(of_trees)) for of_trees in means]
