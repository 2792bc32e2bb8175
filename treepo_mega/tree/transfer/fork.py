"""`branching.at: fork`: no path waits for another, and branches start when every path has ended.

All paths run to their ends as soon as they begin. Each time the tree comes to rest with leaves missing, `tree/fork.py`
chooses where the next ones start: by `branching.fork.threshold` as long as that rule has forks, else the most
uncertain tokens, in `branching.fork.waves` waves of about equal size.

With `fork.draw: other` the branches of a fork begin with tokens that nobody has there. The engine is asked for one
token and the likeliest ones in its place, and this rule draws among those: without replacement, by their probabilities.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.fork import Fork, first_crossings, most_uncertain
from treepo_mega.tree.node import Node, Tree
from treepo_mega.tree.wants import Segment


class ForkTransfer:
    """See the module docstring. State: how many waves of the rule `rank` have started, and the draws to come."""

    def __init__(self, rollout: RolloutConfig) -> None:
        self.rollout = rollout
        self.full = True
        self._waves = 0
        # The branch whose token is asked for -> all that choose from it, and the tokens that they avoid.
        self._draws: dict[int, tuple[list[int], set[int]]] = {}

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

    def await_draw(self, branches: Sequence[int], taken: Collection[int]) -> None:
        """These new nodes begin with tokens not in `taken`, to be chosen when the segment of the first arrives."""
        self._draws[branches[0]] = (list(branches), set(taken))

    def draws_at(self, node_id: int) -> bool:
        """Whether the segment of this node is a law to draw from."""
        return node_id in self._draws

    def draw(self, node_id: int, law: Segment, seed: int) -> list[tuple[int, Segment]]:
        """The branches that waited for `law`, each with its first token.

        Raises ValueError when the driver did not bring the likeliest tokens.
        """
        branches, taken = self._draws.pop(node_id)
        if not law.top:
            raise ValueError(f"node {node_id}: a fork's first token needs the likeliest tokens, got none")
        rng = random.Random(seed)
        drawn = []
        for branch in branches:
            # Where every likely token has its branch, the next one repeats some: a leaf is owed.
            left = [one for one in law.top if one[0] not in taken] or law.top
            (token, logprob) = rng.choices(left, [math.exp(logprob) for _, logprob in left])[0]
            taken.add(token)
            drawn.append((branch, replace(law, tokens=[token], logprobs=[logprob], top=[])))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state; `load_state_dict` is its inverse."""
        draws = [[branches, sorted(taken)] for branches, taken in self._draws.values()]
        return {"waves": self._waves, "draws": draws}

    def load_state_dict(self, state: dict[str, Any], nodes: Sequence[Node]) -> None:
        """Replace all state by that of `state_dict`."""
        self._waves = state["waves"]
        self._draws = {branches[0]: (list(branches), set(taken)) for branches, taken in state["draws"]}
