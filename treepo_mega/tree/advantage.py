"""Credit: one advantage per leaf or node, whitened over the batch. `tree/credit.py` folds them into segments.

    set_rewards(tree, scores)                       # scores in the order of tree.leaves; None = lost
    A = leaf_advantages(tree, "treepo")             # in the order of tree.leaves
    A = whiten(all_A, all_lengths)                  # once, over the whole global batch

Estimators. `R` are leaf rewards, `G_d(i)` the leaves below leaf i's ancestor at depth d (`G_0`: the tree).

    treepo                A_i = mean over depths d of (R_i - mean R(G_d)); paper eq. 5 as its code has it
    treepo_size_weighted  the same mean with weights |G_d|; eq. 6
    grpo                  A_i = (R_i - mean R) / (std R + 1e-6), std unbiased, 0 for one leaf
    rloo                  A_i = R_i - mean of the other rewards; 0 for one leaf
    reinforce_pp          A_i = R_i; the baseline is the batch mean that whitening takes off (REINFORCE++)
    segment               per node, not per leaf: A_v = V(v) - V(parent), V = mean reward of the leaves at or below

For the treepo pair the root group always takes part and a subgroup of one leaf never does (it compares a
leaf with itself). `reject_zero_std_subgroups` (eq. 7) also skips subgroups below the root whose rewards
are all equal; the paper finds that it hurts.

Traps. (1) Printed eq. 5 divides by a std whose indices are unclear; the published code does not, and leaves
the scale to whitening. (2) Whitening weighs a leaf by its tokens, *not* by one: its mean over tokens is 0,
its mean over leaves is not. It needs only (A_i, length_i), so no rank has to hold repeated tokens. (3) A
shared token must keep the positive and the negative sum of its leaves' advantages apart: once the ratio is
clipped the net sum gives another loss (`loss/policy.py`). (4) Sums go through `math.fsum`, which rounds
once, so that results do not depend on the order of leaves, trees or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from treepo_mega.tree.node import ROOT, Tree

Estimator = Literal["treepo", "treepo_size_weighted", "grpo", "rloo", "reinforce_pp"]
"""Estimators that give one number a leaf; `segment` has a function of its own."""

GRPO_EPS = 1e-6
WHITEN_EPS = 1e-8
"""Added to the variance (not to the standard deviation), as in the published code."""


def set_rewards(tree: Tree, scores: Sequence[float | None]) -> int:
    """Write `scores` (in the order of `tree.leaves`) into the tree and return how many were lost.

    A lost score (None) takes its leaf out of the tree, for a leaf without a reward can neither be credited
    nor serve as a baseline; `tree.shortfall` records it. Raises ValueError for a wrong count or a
    non-finite score.
    """
    if len(scores) != len(tree.leaves):
        raise ValueError(f"prompt {tree.prompt_id!r}: {len(scores)} scores for {len(tree.leaves)} leaves")
    kept = [(leaf, float(s)) for leaf, s in zip(tree.leaves, scores, strict=True) if s is not None]
    lost = len(scores) - len(kept)
    tree.leaves, tree.rewards = [leaf for leaf, _ in kept], [s for _, s in kept]
    _checked_rewards(tree)
    if lost:
        note = f"{lost} of {len(scores)} rewards lost"
        tree.shortfall = f"{tree.shortfall}; {note}" if tree.shortfall else note
    return lost


def has_signal(tree: Tree) -> bool:
    """Whether the rewards differ; a tree without signal has advantage 0 everywhere (dynamic sampling drops it)."""
    return len(set(_checked_rewards(tree))) > 1


def leaf_advantages(tree: Tree, estimator: str, *, reject_zero_std_subgroups: bool = False) -> list[float]:
    """One advantage per leaf, in the order of `tree.leaves`, before whitening.

    Raises ValueError for an unknown estimator, missing or non-finite rewards, and for
    `reject_zero_std_subgroups` with an estimator that has no subgroups.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"advantage estimator {estimator!r}: expected one of {', '.join(get_args(Estimator))}")
    rewards = _checked_rewards(tree)
    if estimator in ("grpo", "rloo", "reinforce_pp"):
        if reject_zero_std_subgroups:
            raise ValueError(f"reject_zero_std_subgroups needs a treepo estimator: {estimator} has no subgroups")
        if estimator == "reinforce_pp":
            return list(rewards)
        return _grpo(rewards) if estimator == "grpo" else _rloo(rewards)
    return _treepo(tree, rewards, estimator == "treepo_size_weighted", reject_zero_std_subgroups)


def segment_advantages(tree: Tree, *, sqrt_n: bool = False) -> list[float]:
    """V(node) - V(parent) per node, in the order of `tree.nodes`, before whitening; V is the mean leaf reward below.

    Credit goes to the segment at which the expected reward changed: the advantages on a path add up to its reward
    minus the tree's mean. 0 for the root and for nodes without a leaf below them. `sqrt_n` divides by the square
    root of the leaves below, so that a node's sum over its trajectories grows with their root only. Raises
    ValueError for missing or non-finite rewards.
    """
    rewards = _checked_rewards(tree)
    below = tree.leaves_below()
    value = {node: math.fsum(rewards[i] for i in group) / len(group) for node, group in below.items()}
    out = [0.0] * len(tree.nodes)
    for node, group in below.items():
        if node != ROOT:
            out[node] = (value[node] - value[tree.nodes[node].parent]) / (math.sqrt(len(group)) if sqrt_n else 1.0)
    return out


def whiten(advantages: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Shift and scale to token-weighted mean 0 and variance 1 (unbiased, eps 1e-8 under the root).

    `lengths[i]` is the number of response tokens that carry `advantages[i]`; the result equals whitening
    the advantages repeated once a token. Call it once with the leaves of the whole global batch. With fewer
    than two tokens in all there is no variance: the result is all zeros. Raises ValueError when the two
    lists differ in length, a length is negative or an advantage is not finite.
    """
    if len(advantages) != len(lengths):
        raise ValueError(f"whiten: {len(advantages)} advantages but {len(lengths)} lengths")
    if any(n < 0 for n in lengths):
        raise ValueError(f"whiten: negative length {min(lengths)}")
    if not all(math.isfinite(a) for a in advantages):
        raise ValueError("whiten: an advantage is not finite")
    total = sum(lengths)
    if total < 2:
        return [0.0] * len(advantages)
    mean = math.fsum(a * n for a, n in zip(advantages, lengths, strict=True)) / total
    squares = math.fsum((a - mean) ** 2 * n for a, n in zip(advantages, lengths, strict=True))
    scale = 1.0 / math.sqrt(squares / (total - 1) + WHITEN_EPS)
    return [(a - mean) * scale for a in advantages]


def _checked_rewards(tree: Tree) -> list[float]:
    if len(tree.rewards) != len(tree.leaves):
        raise ValueError(f"prompt {tree.prompt_id!r}: {len(tree.rewards)} rewards for {len(tree.leaves)} leaves")
    for leaf, r in zip(tree.leaves, tree.rewards, strict=True):
        if not math.isfinite(r):
            raise ValueError(f"prompt {tree.prompt_id!r}, leaf {leaf}: reward {r} is not finite")
    return tree.rewards


def _treepo(tree: Tree, rewards: list[float], size_weighted: bool, reject_zero_std: bool) -> list[float]:
    baseline: dict[int, tuple[float, float]] = {}
    for node, group in tree.leaves_below().items():
        values = [rewards[i] for i in group]
        if node != ROOT and (len(values) == 1 or (reject_zero_std and len(set(values)) == 1)):
            continue
        baseline[node] = (math.fsum(values) / len(values), float(len(values)) if size_weighted else 1.0)
    out = []
    for leaf, reward in zip(tree.leaves, rewards, strict=True):
        groups = [baseline[node] for node in tree.ancestry(leaf) if node in baseline]
        weight = math.fsum(w for _, w in groups)
        out.append(math.fsum(w * (reward - mean) for mean, w in groups) / weight)
    return out


def _grpo(rewards: list[float]) -> list[float]:
    n = len(rewards)
    if n < 2:
        return [0.0] * n
    mean = math.fsum(rewards) / n
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - 1))
    return [(r - mean) / (std + GRPO_EPS) for r in rewards]


def _rloo(rewards: list[float]) -> list[float]:
    n = len(rewards)
    if n < 2:
        return [0.0] * n
    total = math.fsum(rewards)
    return [r - (total - r) / (n - 1) for r in rewards]
