"""Credit: one advantage per leaf, whitened over the batch. `tree/credit.py` folds them into segments.

    set_rewards(tree, scores)                       # scores in the order of tree.leaves; None = lost
    A = leaf_advantages(tree, "treepo")             # in the order of tree.leaves
    A = whiten(all_A, all_pairs)                    # once, over the whole global batch

Estimators. `R` are leaf rewards, `G_d(i)` the leaves below leaf i's ancestor at depth d (`G_0`: the tree).

    treepo                A_i = mean over depths d of (R_i - mean R(G_d)); paper eq. 5 as its code has it
    treepo_size_weighted  the same mean with weights |G_d|; eq. 6
    grpo                  A_i = (R_i - mean R) / (std R + 1e-6), std unbiased, 0 for one leaf
    reinforce_pp          A_i = R_i; the baseline is the batch mean that whitening takes off (REINFORCE++)
    reinforce_pp_baseline A_i = R_i - mean R; whitening then divides by the batch's std (REINFORCE++-baseline)

`segment` and `rloo` give one number a node: `tree/node_advantage.py`. `shares` (`tree/descent.py`) weigh the
leaves in every mean and std; without them all leaves count alike. `tree/README.md` says what subgroups count, what
the published code does that the printed equation does not, and what eq. 5 does to credit by depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from treepo_mega.tree.node import ROOT, Tree

LeafEstimator = Literal["treepo", "treepo_size_weighted", "grpo", "reinforce_pp", "reinforce_pp_baseline"]
"""Estimators that give one number a leaf."""

SUBGROUP_ESTIMATORS = ("treepo", "treepo_size_weighted")
GRPO_EPS = 1e-6
WHITEN_EPS = 1e-8
"""Added to the variance (not to the standard deviation), as in the published code."""


def set_rewards(tree: Tree, scores: Sequence[float | None], *, verdicts: Sequence[float | None] | None = None) -> int:
    """Write `scores` (in the order of `tree.leaves`) into the tree and return how many were lost.

    `verdicts`: what the verifier said before any penalty, one for every score. None: the scores themselves.

    A lost score (None) takes its leaf out of the tree, for a leaf without a reward can neither be credited
    nor serve as a baseline; `tree.shortfall` records it. Raises ValueError for a wrong count or a
    non-finite score.
    """
    if len(scores) != len(tree.leaves):
        raise ValueError(f"prompt {tree.prompt_id!r}: {len(scores)} scores for {len(tree.leaves)} leaves")
    before = scores if verdicts is None else verdicts
    kept = [
        (leaf, float(score), float(score if verdict is None else verdict))
        for leaf, score, verdict in zip(tree.leaves, scores, before, strict=True)
        if score is not None
    ]
    lost = len(scores) - len(kept)
    tree.leaves = [leaf for leaf, _, _ in kept]
    tree.rewards = [score for _, score, _ in kept]
    tree.verdicts = [verdict for _, _, verdict in kept]
    checked_rewards(tree)
    if lost:
        note = f"{lost} of {len(scores)} rewards lost"
        tree.shortfall = f"{tree.shortfall}; {note}" if tree.shortfall else note
    return lost


def has_signal(tree: Tree) -> bool:
    """Whether the rewards differ. A tree without signal teaches nothing (dynamic sampling drops it)."""
    return len(set(checked_rewards(tree))) > 1


def leaf_advantages(
    tree: Tree,
    estimator: str,
    *,
    shares: Sequence[float] | None = None,
    reject_zero_std_subgroups: bool = False,
    max_subgroup_depth: int | None = None,
    root_group: bool = True,
    divide_by_std: bool = True,
) -> list[float]:
    """One advantage per leaf, in the order of `tree.leaves`, before whitening.

    Args:
        tree: A graded tree.
        estimator: A `LeafEstimator`.
        shares: What each leaf counts in means and std, in the order of `tree.leaves`. None: all alike.
        reject_zero_std_subgroups: Eq. 7: leave out subgroups below the root whose rewards are all equal.
        max_subgroup_depth: Leave out subgroups deeper than so many segments. None: no limit.
        root_group: Whether the whole tree is a group, too. A leaf without any group has advantage 0.
        divide_by_std: `grpo` alone. Off: R_i - mean R, as Dr.GRPO (Liu et al., 2025) has it.

    Raises ValueError for an unknown estimator, missing or non-finite rewards, shares of another number than leaves,
    and for `reject_zero_std_subgroups` with an estimator that has no subgroups.
    """
    if estimator not in get_args(LeafEstimator):
        raise ValueError(f"advantage estimator {estimator!r}: expected one of {', '.join(get_args(LeafEstimator))}")
    rewards = checked_rewards(tree)
    if shares is not None and len(shares) != len(rewards):
        raise ValueError(f"prompt {tree.prompt_id!r}: {len(shares)} shares for {len(rewards)} leaves")
    if reject_zero_std_subgroups and estimator not in SUBGROUP_ESTIMATORS:
        raise ValueError(f"reject_zero_std_subgroups needs a treepo estimator: {estimator} has no subgroups")
    if estimator == "reinforce_pp":
        return list(rewards)
    if estimator in SUBGROUP_ESTIMATORS:
        groups = _groups(tree, rewards, reject_zero_std_subgroups, max_subgroup_depth, root_group)
        return _treepo(tree, rewards, shares, groups, estimator == "treepo_size_weighted")
    return _against_the_mean(rewards, shares, divide_by_std and estimator == "grpo")


def whiten(advantages: Sequence[float], pairs: Sequence[float]) -> list[float]:
    """Shift and scale to pair-weighted mean 0 and variance 1 (unbiased, eps 1e-8 under the root).

    `pairs[i]` is the number of (trajectory, token) pairs that carry `advantages[i]`. The result equals whitening
    the advantages repeated once a pair. Pairs need not be whole numbers: a leaf may count more or less than another.
    Call it once with the leaves of the whole global batch. With fewer than two pairs in all there is no variance:
    the result is all zeros. Raises ValueError when the two lists differ in length, a number of pairs is negative or
    not finite, or an advantage is not finite.
    """
    if len(advantages) != len(pairs):
        raise ValueError(f"whiten: {len(advantages)} advantages but {len(pairs)} numbers of pairs")
    if not all(math.isfinite(count) and count >= 0 for count in pairs):
        raise ValueError(f"whiten: negative or non-finite number of pairs {min(pairs)}")
    if not all(math.isfinite(value) for value in advantages):
        raise ValueError("whiten: an advantage is not finite")
    total = sum(pairs)
    if total < 2:
        return [0.0] * len(advantages)
    mean = math.fsum(value * count for value, count in zip(advantages, pairs, strict=True)) / total
    squares = math.fsum((value - mean) ** 2 * count for value, count in zip(advantages, pairs, strict=True))
    scale = 1.0 / math.sqrt(squares / (total - 1) + WHITEN_EPS)
    return [(value - mean) * scale for value in advantages]


def checked_rewards(tree: Tree) -> list[float]:
    """The tree's rewards. Raises ValueError unless there is a finite one for every leaf."""
    if len(tree.rewards) != len(tree.leaves):
        raise ValueError(f"prompt {tree.prompt_id!r}: {len(tree.rewards)} rewards for {len(tree.leaves)} leaves")
    for leaf, reward in zip(tree.leaves, tree.rewards, strict=True):
        if not math.isfinite(reward):
            raise ValueError(f"prompt {tree.prompt_id!r}, leaf {leaf}: reward {reward} is not finite")
    return tree.rewards


def mean_reward(rewards: Sequence[float], shares: Sequence[float] | None, group: Sequence[int]) -> float:
    """Mean over the leaves `group` (indices), weighted by their shares if there are any.

    `math.fsum` rounds once, so the mean does not depend on the order of leaves, trees or ranks.
    """
    if shares is None:
        return math.fsum(rewards[index] for index in group) / len(group)
    total = math.fsum(shares[index] for index in group)
    return math.fsum(shares[index] * rewards[index] for index in group) / total


def _groups(
    tree: Tree, rewards: list[float], reject_zero_std: bool, max_depth: int | None, root_group: bool
) -> dict[int, list[int]]:
    """Node -> the leaves of the group below it, for the nodes that have a group."""
    groups = {}
    for node, group in tree.leaves_below().items():
        if node == ROOT:
            if root_group:
                groups[node] = group
            continue
        # A leaf compared with itself says nothing.
        alone = len(group) == 1
        # Exact comparison: a std of equal inexact rewards is not 0, and the published code keeps such groups.
        same = reject_zero_std and len({rewards[index] for index in group}) == 1
        too_deep = max_depth is not None and tree.nodes[node].depth - tree.turns(node) > max_depth
        # Its leaves are those of the turn before it, which is a group already.
        observed = tree.nodes[node].observation
        if not (alone or same or too_deep or observed):
            groups[node] = group
    return groups


def _treepo(
    tree: Tree,
    rewards: list[float],
    shares: Sequence[float] | None,
    groups: dict[int, list[int]],
    size_weighted: bool,
) -> list[float]:
    baseline = {node: mean_reward(rewards, shares, group) for node, group in groups.items()}
    weight = {node: float(len(group)) if size_weighted else 1.0 for node, group in groups.items()}
    out = []
    for leaf, reward in zip(tree.leaves, rewards, strict=True):
        own = [node for node in tree.ancestry(leaf) if node in groups]
        total = math.fsum(weight[node] for node in own)
        out.append(math.fsum(weight[node] * (reward - baseline[node]) for node in own) / total if own else 0.0)
    return out


def _against_the_mean(rewards: list[float], shares: Sequence[float] | None, divide_by_std: bool) -> list[float]:
    """R_i - mean R, and divided by the unbiased standard deviation; zeros for one leaf."""
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = mean_reward(rewards, shares, range(count))
    if not divide_by_std:
        return [reward - mean for reward in rewards]
    if shares is None:
        variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (count - 1)
    else:
        # Unbiased under reliability weights; with equal shares it is the line above.
        spread = math.fsum(share * (reward - mean) ** 2 for share, reward in zip(shares, rewards, strict=True))
        variance = spread / (1.0 - math.fsum(share * share for share in shares))
    std = math.sqrt(variance)
    return [(reward - mean) / (std + GRPO_EPS) for reward in rewards]
