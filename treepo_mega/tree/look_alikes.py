"""Branches that repeat a sibling: `rollout.branching.look_alikes: cut`.

    families = Families(rollout)
    families.started(children)                   # they were made at once, and wait for one another
    for node in families.arrived(node, tree): ...    # those that may go on now, in path order

The children that a node gets at once are a *family*. When the first segments of all its members have arrived, a member
whose first `look_alike_tokens` tokens are those of an earlier member is cut: it is no leaf, and what would have grown
from it grows elsewhere, by the transfer rule. The sibling that it repeats counts its draw (`Node.weight`).

Why that keeps descents fair: given the tokens that both share, what the cut branch would have said has the law of
what its sibling says. So the sibling's leaves may stand for both draws (`tree/descent.py`). Leaves counted all alike
are another matter: rare branches are then over-represented.

Children made by fallback are kept as they come. Otherwise a sure model would be asked for ever for another answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.node import Node, Tree

LOOK_ALIKE = "look_alike"
"""`Node.stop` of a branch that was cut. It is no leaf, so it is no stop reason of one."""


class Families:
    """The families of one tree whose segments are on their way; none where look-alikes are kept."""

    def __init__(self, rollout: RolloutConfig) -> None:
        # Independent samples stay what they are, also where a tree's configuration is sampled without trees.
        self._cuts = rollout.branching.look_alikes == "cut" and rollout.mode == "tree"
        self._tokens = rollout.branching.look_alike_tokens
        # Member -> the ids of its family; of those, the ones that have not arrived.
        self._family: dict[int, list[int]] = {}
        self._waiting: set[int] = set()

    def started(self, children: Sequence[Node]) -> None:
        """These children were made at once, in path order; a single one has nobody to repeat."""
        if self._cuts and len(children) > 1:
            members = [child.id for child in children]
            self._family |= dict.fromkeys(members, members)
            self._waiting |= set(members)

    def holds(self, node: Node) -> bool:
        """Whether the path of `node` must wait for the family after its present segment."""
        return node.id in self._family

    def arrived(self, node: Node, tree: Tree) -> list[Node]:
        """The segment of `node` is in `tree`: the nodes that this settles, cut ones with their stop reason."""
        if node.id not in self._family:
            return [node]
        self._waiting.discard(node.id)
        members = self._family[node.id]
        if not self._waiting.isdisjoint(members):
            return []
        first: dict[tuple[int, ...], Node] = {}
        for member in map(tree.nodes.__getitem__, members):
            del self._family[member.id]
            elder = first.setdefault(tuple(member.tokens[: self._tokens]), member)
            if elder is not member:
                _cut(member, elder, tree)
        return [tree.nodes[member] for member in members]

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state; `load_state_dict` is its inverse."""
        families = {id(members): members for members in self._family.values()}
        return {"families": list(families.values()), "waiting": sorted(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all state by that of `state_dict`."""
        self._family = {}
        for members in state["families"]:
            self._family |= dict.fromkeys(members, members)
        self._waiting = set(state["waiting"])


def _cut(node: Node, elder: Node, tree: Tree) -> None:
    """End the path of `node`, which repeats `elder`; its draw counts for the elder."""
    elder.weight += node.weight
    if node.stop is not None:
        tree.leaves.remove(node.id)
    node.stop = LOOK_ALIKE
    node.peek = []
    tree.counts["look_alikes"] += 1
    tree.counts["look_alike_tokens"] += len(node.tokens)
