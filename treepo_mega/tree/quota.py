"""`transfer: quota`: every node knows how many leaves may still grow from it, so nobody waits for a level.

The root's quota is n_samples_per_prompt. A node that goes on has min(branch_factor, quota) children, which
share its quota, each at least one leaf; a node with quota 1 goes on as a single path. A node that stops is one
leaf, and the rest of its quota is left over: fallback spends it when nothing of the tree is running any more. So
the quotas of what is running and the leaves there are never exceed n_samples_per_prompt together, and branches
move to other paths only through fallback, not to living siblings as under `transfer: level`. The price is more
fallback when paths stop early; the gain is that no segment ever waits for another path.

What a node gives its children is drawn from a generator named by the tree's seed and the node's path, hence the
same for any order of arrival.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.budget import split_equally
from treepo_mega.tree.node import Node


class Quotas:
    """The quotas of the nodes of one tree whose segments are on their way; empty while the tree is at rest."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._quota: dict[int, int] = {}

    def split(self, quota: int, children: Sequence[Node], path: tuple[int, ...]) -> None:
        """Share the `quota` of the node at `path` among its new children, in path order."""
        self.share(quota, children, random.Random(derive_seed(self._seed, "quota", *path)))

    def share(self, quota: int, nodes: Sequence[Node], rng: random.Random) -> None:
        """Share `quota` equally among any new nodes, in the order given; `rng` says who gets what is left over.

        Raises ValueError when there are more nodes than leaves to give.
        """
        for node, part in zip(nodes, split_equally(quota, len(nodes), rng), strict=True):
            self._quota[node.id] = part

    def ended(self, node: Node) -> list[tuple[int, int]]:
        """The segment of `node` has arrived: the nodes that may branch now, as (node id, quota)."""
        quota = self._quota.pop(node.id)
        return [] if node.stop is not None else [(node.id, quota)]
