"""`transfer: quota`: every node knows how many leaves may still grow from it, so nobody waits for a level.

The root's quota is n_samples_per_prompt. A node that goes on has min(branch_factor, quota) children, which
share its quota, each at least one leaf; a node with quota 1 goes on as a single path. A node that stops is one
leaf, and the rest of its quota is left over: fallback spends it when nothing of the tree is running any more. So
the quotas of what is running and the leaves there are never exceed n_samples_per_prompt together, and branches
move to other paths only through fallback, not to living siblings as under `transfer: level`. The price is more
fallback when paths stop early; the gain is that no segment ever waits for another path.

`budget: low_prob | high_prob` compare siblings, so their shares are known only when the segments of the whole
*family* (the children made at once at one node) have arrived; its members then share the family's quota by weight,
and those that stopped need no more than their one leaf. A family with nothing to allot, one member or one leaf
each, does not wait. Nobody waits for a cousin. Children made by fallback share equally: they are no family.

What a node gives its children is drawn from a generator named by the tree's seed and the node's path, hence the
same for any order of arrival.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.budget import split_equally
from treepo_mega.tree.node import Node

Weigh = Callable[[int, Sequence[Node]], list[int]]
"""Splits a number of leaves over living siblings, each at least one, by their segments."""


@dataclass(slots=True)
class _Family:
    """Siblings whose shares of `quota` wait for the segments of all of them."""

    quota: int
    waiting: set[int]
    living: list[Node]


class Quotas:
    """The quotas of the nodes of one tree whose segments are on their way; empty while the tree is at rest.

    `weigh` shares a family's leaves by its members' segments; None: equally, and without waiting for them.
    """

    def __init__(self, seed: int, weigh: Weigh | None = None) -> None:
        self._seed, self._weigh = seed, weigh
        self._quota: dict[int, int] = {}
        self._family: dict[int, _Family] = {}

    def split(self, quota: int, children: Sequence[Node], path: tuple[int, ...]) -> None:
        """Share the `quota` of the node at `path` among its new children, in path order."""
        if self._weigh is not None and 1 < len(children) < quota:
            family = _Family(quota, {node.id for node in children}, [])
            self._family |= dict.fromkeys(family.waiting, family)
            return
        self.share(quota, children, random.Random(derive_seed(self._seed, "quota", *path)))

    def share(self, quota: int, nodes: Sequence[Node], rng: random.Random) -> None:
        """Share `quota` equally among any new nodes, in the order given; `rng` says who gets what is left over.

        Raises ValueError when there are more nodes than leaves to give.
        """
        for node, part in zip(nodes, split_equally(quota, len(nodes), rng), strict=True):
            self._quota[node.id] = part

    def is_single(self, node: Node) -> bool:
        """Whether only one leaf may still grow from `node`, which therefore goes on as a single path."""
        return self._quota.get(node.id) == 1

    def ended(self, node: Node) -> list[tuple[int, int]]:
        """The segment of `node` has arrived: the nodes that may branch now, as (node id, quota)."""
        if node.id in self._quota:
            quota = self._quota.pop(node.id)
            return [] if node.stop is not None else [(node.id, quota)]
        family = self._family.pop(node.id)
        family.waiting.remove(node.id)
        if node.stop is not None:
            family.quota -= 1
        else:
            family.living.append(node)
        if family.waiting or not family.living or self._weigh is None:
            return []
        living = sorted(family.living, key=lambda n: n.path)
        return [(n.id, q) for n, q in zip(living, self._weigh(family.quota, living), strict=True)]

    def dump(self) -> dict[str, Any]:
        """JSON-safe state; `load` is its inverse."""
        families = {id(f): f for f in self._family.values()}
        return {
            "quota": list(self._quota.items()),
            "families": [(f.quota, sorted(f.waiting), [n.id for n in f.living]) for f in families.values()],
        }

    def load(self, state: dict[str, Any], nodes: Sequence[Node]) -> None:
        """Replace all quotas by those of `dump`; `nodes` are the tree's."""
        self._quota = {int(i): q for i, q in state["quota"]}
        self._family = {}
        for quota, waiting, living in state["families"]:
            family = _Family(quota, set(waiting), [nodes[i] for i in living])
            self._family |= dict.fromkeys(family.waiting, family)
