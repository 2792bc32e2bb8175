"""How different the leaves of a tree are. Pure Python; linear in tokens, quadratic in the leaves of a tree.

    distinct_responses(tree)                # how many
    effective_samples(tree)                 # 1 / sum of squared shares of the distinct responses
    independent_samples(tree)               # how many draws of the policy a token in each quarter of the path is one of
    common_tokens(tree)                     # (tokens before the first difference, summed over pairs; pairs)

A tree may have many leaves and few responses: where a border falls at a place at which nothing is decided, the
branches repeat one another.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

from treepo_mega.tree.credit import QUARTERS
from treepo_mega.tree.descent import descent_shares
from treepo_mega.tree.node import Tree


def distinct_responses(tree: Tree) -> int:
    """Unlike responses of the tree's leaves."""
    return len({tuple(tree.response(leaf)) for leaf in tree.leaves})


def effective_samples(tree: Tree) -> float:
    """1 / sum of squared shares of the distinct responses: as many equal shares are as unlike; 0 without a leaf.

    Four leaves with two responses, three of one, are 1 / (0.75 ** 2 + 0.25 ** 2) = 1.6 samples.
    """
    if not tree.leaves:
        return 0.0
    copies = Counter(tuple(tree.response(leaf)) for leaf in tree.leaves)
    return len(tree.leaves) ** 2 / sum(count * count for count in copies.values())


def independent_samples(tree: Tree) -> list[float]:
    """Draws of the policy that the leaves stand for in the middle of each quarter of their paths, first to last.

    1 / sum of squared shares of the segments that the leaves are in there, each leaf by its descent: what leaves share
    was drawn once, and is one sample however many go through it. Independent samples have as many as leaves in every
    quarter. Zeros without a leaf. Reads structure alone.

    >>> tree = Tree.start("p", [1])
    >>> for parent, size in ((0, 4), (1, 4), (1, 4), (0, 4)):
    ...     tree.add_child(parent).tokens = [5] * size
    >>> tree.leaves = [2, 3, 4]
    >>> [round(samples, 2) for samples in independent_samples(tree)]
    [2.0, 2.0, 2.67, 2.67]
    """
    places = [(quarter + 0.5) / QUARTERS for quarter in range(QUARTERS)]
    if not tree.leaves:
        return [0.0] * QUARTERS
    shares: list[dict[int, float]] = [defaultdict(float) for _ in places]
    for leaf, share in zip(tree.leaves, descent_shares(tree), strict=True):
        length = tree.response_length(leaf)
        end = 0
        quarter = 0
        for node in tree.ancestry(leaf)[1:]:
            end += 0 if tree.nodes[node].observation else len(tree.nodes[node].tokens)
            while quarter < QUARTERS and (places[quarter] * length < end or node == leaf):
                shares[quarter][node] += share
                quarter += 1
    return [1.0 / math.fsum(share * share for share in of_quarter.values()) for of_quarter in shares]


def common_tokens(tree: Tree) -> tuple[int, int]:
    """Response tokens before the first difference, summed over pairs of unlike leaves, and the number of such pairs.

    Leaves with equal responses have no difference: those pairs are left out.
    """
    # In order, what two responses have in common is the least that neighbours between them have in common.
    copies = sorted(Counter(tuple(tree.response(leaf)) for leaf in tree.leaves).items())
    shared = [common_prefix(left, right) for (left, _), (right, _) in pairwise(copies)]
    tokens = pairs = 0
    for first, (_, count) in enumerate(copies):
        least = None
        for second in range(first + 1, len(copies)):
            here = shared[second - 1]
            least = here if least is None else min(least, here)
            both = count * copies[second][1]
            tokens += both * least
            pairs += both
    return tokens, pairs


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens at the beginning that both have.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5]), common_prefix([1], [1, 2])
    (2, 1)
    """
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
