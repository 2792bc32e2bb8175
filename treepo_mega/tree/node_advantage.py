"""Credit by node: one advantage per segment of the tree, not per leaf. `credit.fold_nodes` folds it.

    A = node_advantages(tree, "rloo")               # in the order of tree.nodes; 0 for the root

V(v) is the mean reward of the leaves at or below node v. A *segment* reaches from branch to branch: a node that is
its parent's only child with leaves continues its parent's segment and has its advantage.

    segment   V(v) - V(parent of the segment's first node): the change of the expected reward there. The
              advantages of the segments on a path add up to its reward minus the tree's mean.
    rloo      V(v) - mean reward of the leaves that are not below v. Leave-one-out (Ahmadian et al., 2024) leaves out
              what shares the token: on a tree all leaves below it. Flat groups get the usual RLOO.

`rloo` with shares of a descent is an unbiased gradient of the policy: a baseline of leaves that the token did not
lead to is independent of it, and their shares add up to a number that was known before it was sampled. A node that
stands for siblings which were cut leaves out one of its draws, and keeps the others.
`segment` is not: it discounts early segments. The official node variants (mean of children, z-scores among siblings)
are other functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from treepo_mega.tree.advantage import checked_rewards, mean_reward
from treepo_mega.tree.node import ROOT, Tree

NodeEstimator = Literal["segment", "rloo"]
"""Estimators that give one number a node."""

NODE_ESTIMATORS = get_args(NodeEstimator)


def node_advantages(
    tree: Tree, estimator: str, *, shares: Sequence[float] | None = None, sqrt_n: bool = False
) -> list[float]:
    """One advantage per node, in the order of `tree.nodes`, before whitening; see the module docstring.

    0 for the root and for nodes without a leaf below them. `shares`: what each leaf counts in the means, in the order
    of `tree.leaves`; None: all alike. `sqrt_n` divides by the square root of the leaves below, so that a node's sum
    over its trajectories grows with their root only. Raises ValueError for an unknown estimator, and for missing or
    non-finite rewards.
    """
    if estimator not in NODE_ESTIMATORS:
        raise ValueError(f"advantage estimator {estimator!r}: expected one of {', '.join(NODE_ESTIMATORS)}")
    rewards = checked_rewards(tree)
    below = tree.leaves_below()
    below_root = below.pop(ROOT, [])
    value = {node: mean_reward(rewards, shares, group) for node, group in below.items()}
    if estimator == "segment":
        value[ROOT] = mean_reward(rewards, shares, below_root) if below_root else 0.0
        credited = _segment(tree, value)
    else:
        credited = {node: value[node] - _mean_elsewhere(rewards, shares, group) for node, group in below.items()}
        # All leaves below a node leave nothing to compare it with.
        credited |= {node: 0.0 for node, group in below.items() if len(group) == len(rewards)}
        if shares is not None:
            credited |= _against_own_copies(tree, rewards, shares, value, below)
    out = [0.0] * len(tree.nodes)
    for node, group in below.items():
        out[node] = credited[node] / (math.sqrt(len(group)) if sqrt_n else 1.0)
    return out


def _segment(tree: Tree, value: dict[int, float]) -> dict[int, float]:
    """Node -> V(v) - V(parent), inherited along a chain of only children."""
    credited: dict[int, float] = {}
    # Parents come before their children.
    for node in tree.nodes[1:]:
        if node.id not in value:
            continue
        siblings = [child for child in tree.nodes[node.parent].children if child in value]
        if len(siblings) == 1 and node.parent != ROOT:
            credited[node.id] = credited[node.parent]
        else:
            credited[node.id] = value[node.id] - value[node.parent]
    return credited


def _against_own_copies(
    tree: Tree, rewards: Sequence[float], shares: Sequence[float], value: dict[int, float], below: dict[int, list[int]]
) -> dict[int, float]:
    """Node -> advantage under rloo, for nodes that stand for siblings which repeated them (`tree/look_alikes.py`).

    Of w draws with the same tokens one is left out, as a flat group would; the others have the node's own value.
    """
    total = math.fsum(shares)
    mean = mean_reward(rewards, shares, range(len(rewards)))
    out = {}
    for node, group in below.items():
        # Cutting makes whole weights; fractions are those of forks, whose branches were drawn unlike.
        weight = tree.nodes[node].weight
        if tree.nodes[node].fork is not None or weight <= 1:
            continue
        own = math.fsum(shares[index] for index in group) / total / weight
        out[node] = value[node] - (mean - own * value[node]) / (1 - own)
    return out


def _mean_elsewhere(rewards: Sequence[float], shares: Sequence[float] | None, group: Sequence[int]) -> float:
    """Mean reward of the leaves outside `group`; 0 when there are none."""
    inside = set(group)
    outside = [index for index in range(len(rewards)) if index not in inside]
    return mean_reward(rewards, shares, outside) if outside else 0.0
