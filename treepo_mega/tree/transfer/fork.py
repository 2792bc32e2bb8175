"""`branching.at: fork`: no path waits for another, and branches start when every path has ended.

All paths run to their ends as soon as they begin. Each time the tree comes to rest with leaves missing, `tree/fork.py`
chooses where the next ones start: by `branching.fork.threshold` as long as that rule has forks, else the most
uncertain tokens, in `branching.fork.waves` waves of about equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.fork import Fork, first_crossings, most_uncertain
from treepo_mega.tree.node import Node, Tree


class ForkTransfer:
    """See the module docstring. State: how many waves of the rule `rank` have started."""

    def __init__(self, rollout: RolloutConfig) -> None:
        self.rollout = rollout
        self.full = True
        self._waves = 0

    def begin(self, width: int, missing: int) -> None:
        """The trunks are about to start: each is a path of its own."""

    def started(self, parent: Node, children: Sequence[Node]) -> None:
        """New paths wait for nobody."""

    def started_anew(self, children: Sequence[Node], missing: int) -> None:
        """Nor do branches that start at a fork."""

    def is_single(self, node: Node) -> bool:
        """True: nothing branches before the tree is at rest."""
        return True

    def arrived(self, node: Node, tree: Tree) -> list[tuple[Node, int]]:
        """A path that has not ended goes on."""
        return [(node, 1)] if node.stop is None else []

    def choose(self, tree: Tree, missing: int, affordable: int) -> list[Fork]:
        """Where the next branches of a tree at rest start, of the `missing` leaves at most `affordable` (at least 1).

        None only when fallback is off and the threshold has no forks left.
        """
        fork = self.rollout.branching.fork
        borders_only = self.rollout.segment.end != "length"
        if fork.threshold is not None:
            found = first_crossings(
                tree,
                self.rollout.n_samples_per_prompt,
                threshold=fork.threshold,
                factor=self.rollout.branching.factor,
                distance=fork.distance,
                borders_only=borders_only,
            )
            if found or self.rollout.fallback.from_ == "none":
                return found
        # The last wave brings all that is missing: a tree never ends short for want of waves.
        wave = -(-missing // max(1, fork.waves - self._waves))
        self._waves += 1
        return most_uncertain(
            tree, min(wave, affordable), signal=fork.signal, distance=fork.distance, borders_only=borders_only
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state; `load_state_dict` is its inverse."""
        return {"waves": self._waves}

    def load_state_dict(self, state: dict[str, Any], nodes: Sequence[Node]) -> None:
        """Replace all state by that of `state_dict`."""
        self._waves = state["waves"]
