"""What the page shows of one tree, as plain lists: an `Outline` without text. Pure Python.

    found = outline(tree, "uniform")
    found.head           one list a figure, one entry a node or a leaf; JSON-safe
    found.summary        what the list of prompts shows

V(node) is the mean reward of the leaves at or below a node; a node's advantage is the mean of theirs, or its own where
the estimator gives one a node. Both means count leaves as `algo.leaf_weight` does.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treepo_mega.tree.advantage import mean_reward
from treepo_mega.tree.descent import leaf_shares
from treepo_mega.tree.node import ROOT, Tree

DIGITS = 4
"""Significant digits of a figure: more would only make the page larger."""


@dataclass(frozen=True)
class Outline:
    """A tree without its text. `tokens`: the token ids of each node, which alone need a tokenizer."""

    prompt_id: str
    tokens: list[Sequence[int]]
    head: dict[str, Any]
    summary: dict[str, Any]

    @property
    def advantages(self) -> bool:
        """Whether the tree says what the step trained with."""
        return any(value is not None for value in self.head["credit"])


def outline(tree: Tree, leaf_weight: str) -> Outline:
    """The figures of `tree`; its nodes' tokens are kept, not copied.

    Raises ValueError when rewards or verdicts are not one a leaf, or for advantages that are neither one a leaf nor one
    a node.
    """
    for name, values in (("rewards", tree.rewards), ("verdicts", tree.verdicts)):
        if len(values) not in (0, len(tree.leaves)):
            raise ValueError(f"{len(values)} {name} for {len(tree.leaves)} leaves")
    if len(tree.advantages) not in (0, len(tree.leaves), len(tree.nodes)):
        raise ValueError(f"{len(tree.advantages)} advantages for {len(tree.leaves)} leaves, {len(tree.nodes)} nodes")
    below = tree.leaves_below()
    shares = leaf_shares(tree, leaf_weight)
    sizes = [len(node.tokens) for node in tree.nodes]
    alike = look_alikes(tree)
    flat = sum(sum(sizes[node] for node in tree.ancestry(leaf)[1:]) for leaf in tree.leaves)
    by_node = len(tree.advantages) == len(tree.nodes)
    entropy = [_entropy(tree, node, below) for node in range(len(tree.nodes))]
    forks = _fork_places(tree, entropy)
    head = {
        "id": tree.prompt_id,
        "shortfall": tree.shortfall,
        "counts": {name: rounded(value) for name, value in tree.counts.items()},
        "parent": [node.parent for node in tree.nodes],
        "size": sizes,
        "stop": [node.stop for node in tree.nodes],
        "version": [node.policy_version for node in tree.nodes],
        "fallback": [node.id for node in tree.nodes if node.fallback],
        "observation": [node.id for node in tree.nodes if node.observation],
        "hidden": {str(node.id): [node.hidden, node.restated] for node in tree.nodes if node.hidden},
        "fork": {str(node.id): node.fork for node in tree.nodes if node.fork},
        "value": _means(tree, tree.rewards, shares, below),
        "credit": [rounded(one) if below.get(node) else None for node, one in enumerate(tree.advantages)]
        if by_node
        else _means(tree, tree.advantages, shares, below),
        "surprisal": [None if node.observation else _mean_surprisal(node.logprobs) for node in tree.nodes],
        "entropy": entropy,
        "fork_places": forks,
        "leaves": tree.leaves,
        "rewards": [rounded(value) for value in tree.rewards],
        "verdicts": [rounded(value) for value in tree.verdicts],
        "alike": alike,
    }
    summary = {
        "id": tree.prompt_id,
        "rewards": head["rewards"],
        "spread": rounded(max(tree.rewards) - min(tree.rewards)) if tree.rewards else None,
        "mean": rounded(math.fsum(tree.rewards) / len(tree.rewards)) if tree.rewards else None,
        "leaves": len(tree.leaves),
        "nodes": len(tree.nodes),
        "unique": sum(sizes[node] for node in below if node != ROOT),
        "flat": flat,
        "stops": dict(Counter(str(tree.nodes[leaf].stop) for leaf in tree.leaves)),
        "alike": sum(group is not None for group in alike),
        "forks": len(forks),
        "short": tree.shortfall is not None,
    }
    return Outline(tree.prompt_id, [node.tokens for node in tree.nodes], head, summary)


def rounded(value: float) -> float | None:
    """To `DIGITS` significant digits; None for what JSON cannot hold.

    >>> rounded(1 / 3), rounded(2.0), rounded(float("nan"))
    (0.3333, 2, None)
    """
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() else short


def look_alikes(tree: Tree) -> list[int | None]:
    """For each leaf the number of its group of equal responses, from 0; None for a leaf like no other.

    >>> tree = Tree.start("p", [1])
    >>> for token in (7, 8, 7):
    ...     leaf = tree.add_child(0)
    ...     leaf.tokens = [token]
    ...     tree.leaves.append(leaf.id)
    >>> look_alikes(tree)
    [0, None, 0]
    """
    digests = [hashlib.blake2b()]
    for node in tree.nodes[1:]:
        # A copy of the parent's: every token is hashed once, however many leaves share it.
        digest = digests[node.parent].copy()
        digest.update(array("I", node.tokens).tobytes())
        digests.append(digest)
    names = [digests[leaf].digest() for leaf in tree.leaves]
    several = [name for name, count in Counter(names).items() if count > 1]
    return [several.index(name) if name in several else None for name in names]


def _means(
    tree: Tree, values: Sequence[float], shares: Sequence[float] | None, below: dict[int, list[int]]
) -> list[float | None]:
    """For each node the mean of its leaves' values; None without a leaf that counts."""
    out: list[float | None] = [None] * len(tree.nodes)
    for node, group in below.items() if values else ():
        # A leaf that counts nothing (a fallback's, under `descent`) leaves no mean.
        if shares is None or math.fsum(shares[index] for index in group) > 0:
            out[node] = rounded(mean_reward(values, shares, group))
    return out


def _mean_surprisal(logprobs: Sequence[float]) -> float | None:
    return rounded(-math.fsum(logprobs) / len(logprobs)) if logprobs else None


def _entropy(tree: Tree, node: int, below: dict[int, list[int]]) -> list[Any] | None:
    """At a branch point [nats, how it is known]; None elsewhere.

    `stored`: the tree carries the entropy of the distribution. `likeliest`: of the likeliest tokens that were asked
    for, a lower bound. `drawn`: the mean surprisal of the branches' first tokens, an estimate from as many draws.
    """
    branches = [tree.nodes[child] for child in tree.nodes[node].children if child in below]
    if len(branches) < 2:
        return None
    stored = next((branch.entropies[0] for branch in branches if branch.entropies), None)
    if stored is not None:
        return [rounded(stored), "stored"]
    if peek := tree.nodes[node].peek:
        return [rounded(-math.fsum(math.exp(logprob) * logprob for logprob in peek)), "likeliest"]
    first = [branch.logprobs[0] for branch in branches if branch.logprobs]
    return [rounded(-math.fsum(first) / len(first)), "drawn"] if first else None


def _fork_places(tree: Tree, entropy: Sequence[list[Any] | None]) -> dict[str, int]:
    """The nodes at whose ends branches fork, with the place of each by its entropy: from 1, the highest first."""
    points = sorted({node.parent for node in tree.nodes if node.fork})
    known = {point: found[0] for point in points if (found := entropy[point]) and found[0] is not None}
    points.sort(key=lambda point: -known.get(point, -math.inf))
    return {str(point): place for place, point in enumerate(points, 1)}
