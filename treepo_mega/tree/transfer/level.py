"""`transfer: level`: who branches is decided when a whole level of the tree has arrived, in path order.

The leaves that ended paths leave over go to the living paths of the same level. Once living and ended paths are as
many as leaves were asked for, nothing is left to decide (`full`): no path waits for another any more, and the tree is
still the one that levels give. Branches that no border was uncertain enough for (`budget.floor`) are kept for the next
level.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.budget import Split, children_by_certainty, count_decision, level_budget, split_by_width
from treepo_mega.tree.node import Node, Tree


class LevelTransfer:
    """See the module docstring. `affordable(n)`: new segments that the token budget still holds, at most n."""

    def __init__(
        self,
        rollout: RolloutConfig,
        rng: random.Random,
        affordable: Callable[[int], int],
        split: Split | None = None,
    ) -> None:
        self.rollout = rollout
        self.full = False
        self._rng = rng
        self._affordable = affordable
        self._plugin = split
        self._waiting: set[int] = set()
        self._arrived: list[Node] = []
        self._kept = 0
        """Branches that earlier levels left over."""

    def begin(self, width: int, missing: int) -> None:
        """The root is about to get `width` children, for the `missing` leaves."""
        self.full = width == missing

    def started(self, parent: Node, children: Sequence[Node]) -> None:
        """The level waits for these children too, unless nothing is left to decide."""
        if not self.full:
            self._waiting |= {node.id for node in children}

    def started_anew(self, children: Sequence[Node], missing: int) -> None:
        """The children that a fallback made for the `missing` leaves are a level of their own."""
        self.full = len(children) == missing
        if not self.full:
            self._waiting = {node.id for node in children}

    def is_single(self, node: Node) -> bool:
        """True when nothing is left to decide."""
        return self.full

    def arrived(self, node: Node, tree: Tree) -> list[tuple[Node, int]]:
        """The nodes that branch now, each with its number of children: none before the level is complete."""
        if self.full:
            return [(node, 1)] if node.stop is None else []
        self._waiting.remove(node.id)
        self._arrived.append(node)
        if self._waiting:
            return []
        # In path order: the order of arrival must not decide who gets the odd branch.
        level = sorted(self._arrived, key=lambda arrived: arrived.path)
        self._arrived = []
        living = [arrived for arrived in level if arrived.stop is None]
        if not living:
            return []
        width = self.rollout.n_samples_per_prompt
        just_finished = len(level) - len(living)
        branching = self.rollout.branching
        widths = [branching.width(observed=tree.answered(arrived.id)) for arrived in living]
        # What is asked for right after observations comes on top of what earlier levels left over.
        more = sum(widths) - branching.factor * len(living)
        total = level_budget(len(living), len(tree.leaves), just_finished, width, branching.factor, self._kept + more)
        # Living paths are finished whatever the token budget says: cutting them would favour short responses.
        total = max(len(living), self._affordable(total))
        shares = self._split(total, living, widths)
        count_decision(tree.counts, shares, total)
        self._kept = total - sum(shares)
        self.full = sum(shares) + len(tree.leaves) == width
        return list(zip(living, shares, strict=True))

    def _split(self, total: int, living: Sequence[Node], widths: Sequence[int]) -> list[int]:
        """At most `total` children over the living paths of a level, by `rollout.branching.budget`.

        `widths`: what each asks for.
        """
        if self.rollout.branching.budget.kind == "equal":
            return split_by_width(total, widths, self._rng)
        if self._plugin is not None:
            return self._plugin(total, living, self.rollout)
        return children_by_certainty(total, living, self.rollout, widths)

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state; `load_state_dict` is its inverse."""
        return {
            "full": self.full,
            "waiting": sorted(self._waiting),
            "arrived": [node.id for node in self._arrived],
            "kept": self._kept,
        }

    def load_state_dict(self, state: dict[str, Any], nodes: Sequence[Node]) -> None:
        """Replace all state by that of `state_dict`; `nodes` are the tree's."""
        self.full = state["full"]
        self._waiting = set(state["waiting"])
        self._arrived = [nodes[i] for i in state["arrived"]]
        # A state of before there was a floor kept nothing.
        self._kept = state.get("kept", 0)
