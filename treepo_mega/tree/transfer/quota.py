"""`transfer: quota`: every node knows how many leaves may still grow from it, so no path waits for a level.

The root's quota is n_samples_per_prompt. A node that goes on has min(branching.factor, quota) children, which
share its quota, each at least one leaf; a node with quota 1 goes on as a single path. A node that stops is one
leaf. Fallback spends the rest of its quota when nothing of the tree is running any more. The price is more fallback
when paths stop early; the gain is that no segment waits for another path.

Every budget but `equal` compares siblings. Their shares are known when the segments of the whole *family* (the
children made at once at one node) have arrived. Its members then share the family's quota by weight. A member that does
not reach `budget.floor` goes on as one child, which has its whole quota.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.budget import Split, certainty, count_decision, reach_floor, split_by_certainty, split_equally
from treepo_mega.tree.look_alikes import LOOK_ALIKE
from treepo_mega.tree.node import ROOT, Node, Tree


@dataclass(slots=True)
class _Family:
    """Siblings whose shares of `quota` wait for the segments of all of them."""

    quota: int
    waiting: set[int]
    living: list[Node]


class QuotaTransfer:
    """The quotas of the nodes of one tree whose segments are on their way; none while the tree is at rest.

    `seed` is the tree's, `rng` its generator, which only a fallback draws from.
    """

    def __init__(self, rollout: RolloutConfig, seed: int, rng: random.Random, split: Split | None = None) -> None:
        self.rollout = rollout
        self.full = False
        self._seed = seed
        self._rng = rng
        self._plugin = split
        self._quota: dict[int, int] = {}
        self._family: dict[int, _Family] = {}
        self._branching: dict[int, int] = {}
        """Quotas of the nodes that were told to branch and have no children yet."""

    def begin(self, width: int, missing: int) -> None:
        """The root is about to get `width` children, which share the `missing` leaves."""
        self._branching[ROOT] = missing

    def started(self, parent: Node, children: Sequence[Node]) -> None:
        """Share the quota of `parent` among its new children, in path order."""
        quota = self._branching.pop(parent.id)
        # A family with nothing to allot, one member or one leaf each, does not wait for its members.
        if self.rollout.branching.budget.kind != "equal" and 1 < len(children) < quota:
            family = _Family(quota, {node.id for node in children}, [])
            self._family |= dict.fromkeys(family.waiting, family)
            return
        # A generator named by the path, not the tree's own: the shares are the same for any order of arrival.
        self._share(quota, children, random.Random(derive_seed(self._seed, "quota", *parent.path)))

    def started_anew(self, children: Sequence[Node], missing: int) -> None:
        """Share the `missing` leaves equally among the children that a fallback made, in the order given."""
        # Children made by fallback come from different nodes: they are no family, and share equally.
        self.full = len(children) == missing
        self._share(missing, children, self._rng)

    def _share(self, quota: int, nodes: Sequence[Node], rng: random.Random) -> None:
        """Share `quota` equally among new nodes, in the order given; `rng` says who gets what is left over.

        Raises ValueError when there are more nodes than leaves to give.
        """
        for node, part in zip(nodes, split_equally(quota, len(nodes), rng), strict=True):
            self._quota[node.id] = part

    def is_single(self, node: Node) -> bool:
        """True when only one leaf may still grow from `node`, which therefore goes on as a single path."""
        return self._quota.get(node.id) == 1

    def arrived(self, node: Node, tree: Tree) -> list[tuple[Node, int]]:
        """The nodes that branch now, each with its number of children."""
        branching = self._quotas_known_by(node, tree)
        self._branching |= {parent.id: quota for parent, quota in branching}
        branches = self._reach_floor(branching)
        # What a node under the floor has beyond its one child is kept for later.
        spent = [quota if does else 1 for (_, quota), does in zip(branching, branches, strict=True)]
        if branching:
            count_decision(tree.counts, spent, sum(quota for _, quota in branching))
        return [
            (parent, min(self._width(parent, tree), most)) for (parent, _), most in zip(branching, spent, strict=True)
        ]

    def _width(self, node: Node, tree: Tree) -> int:
        """Children of `node` if its quota allows them."""
        return self.rollout.branching.width(observed=tree.answered(node.id))

    def _reach_floor(self, branching: list[tuple[Node, int]]) -> list[bool]:
        """Whether each of these nodes, which were decided together, branches if its quota allows it."""
        budget = self.rollout.branching.budget
        # With one leaf to come there may be no look at the next token.
        if budget.kind == "equal" or budget.floor is None or all(quota == 1 for _, quota in branching):
            return [True] * len(branching)
        return reach_floor([certainty(parent, self.rollout) for parent, _ in branching], budget)

    def _quotas_known_by(self, node: Node, tree: Tree) -> list[tuple[Node, int]]:
        """The living nodes whose quotas are settled by the arrival of `node`, with their quotas."""
        if node.id in self._quota:
            quota = self._quota.pop(node.id)
            return [] if node.stop is not None else [(node, quota)]
        family = self._family.pop(node.id)
        family.waiting.remove(node.id)
        # A member that stopped needs no more than its one leaf; one that was cut leaves its quota to the others.
        if node.stop is not None:
            family.quota -= node.stop != LOOK_ALIKE
        else:
            family.living.append(node)
        if family.waiting or not family.living:
            return []
        living = sorted(family.living, key=lambda member: member.path)
        if self._plugin is not None:
            shares = self._plugin(family.quota, living, self.rollout)
        else:
            widths = [self._width(member, tree) for member in living]
            shares = split_by_certainty(family.quota, living, self.rollout, widths)
        return list(zip(living, shares, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state; `load_state_dict` is its inverse."""
        # Each member points to its family: write a family once, by identity.
        families = {id(family): family for family in self._family.values()}
        return {
            "seed": self._seed,
            "full": self.full,
            "quota": list(self._quota.items()),
            "families": [
                (family.quota, sorted(family.waiting), [node.id for node in family.living])
                for family in families.values()
            ],
        }

    def load_state_dict(self, state: dict[str, Any], nodes: Sequence[Node]) -> None:
        """Replace all state by that of `state_dict`; `nodes` are the tree's."""
        self._seed = state["seed"]
        self.full = state["full"]
        self._quota = {int(node_id): quota for node_id, quota in state["quota"]}
        self._family = {}
        self._branching = {}
        for quota, waiting, living in state["families"]:
            family = _Family(quota, set(waiting), [nodes[i] for i in living])
            self._family |= dict.fromkeys(family.waiting, family)
