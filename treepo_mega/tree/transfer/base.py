"""What `TreeSearch` asks of a transfer rule, and the rule that `rollout.branching` names (`at`, then `transfer`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from treepo_mega.config import RolloutConfig
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.budget import Split
from treepo_mega.tree.node import Node, Tree
from treepo_mega.tree.transfer.fork import ForkTransfer
from treepo_mega.tree.transfer.level import LevelTransfer
from treepo_mega.tree.transfer.quota import QuotaTransfer


class Transfer(Protocol):
    """One rule for one tree. `rollout` may be replaced between two steps: its budget temperature moves on."""

    rollout: RolloutConfig
    full: bool
    """True when every running path grows into exactly one leaf, and no leaf is missing: nothing is left to decide."""

    def begin(self, width: int, missing: int) -> None:
        """The root is about to get `width` children, for the `missing` leaves."""

    def started(self, parent: Node, children: Sequence[Node]) -> None:
        """`parent` has got these children, in path order, and their segments are wanted."""

    def started_anew(self, children: Sequence[Node], missing: int) -> None:
        """A fallback made `children` for the `missing` leaves of a tree at rest. Their segments are wanted."""

    def is_single(self, node: Node) -> bool:
        """True when exactly one leaf grows from the running `node`: nobody will branch from its path."""

    def arrived(self, node: Node, tree: Tree) -> list[tuple[Node, int]]:
        """The segment of `node` is in `tree`. Returns the nodes that branch now, each with its number of children."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state; `load_state_dict` is its inverse."""

    def load_state_dict(self, state: dict[str, Any], nodes: Sequence[Node]) -> None:
        """Replace all state by that of `state_dict`; `nodes` are the tree's."""


def make_transfer(
    rollout: RolloutConfig, seed: int, rng: random.Random, affordable: Callable[[int], int], split: Split | None
) -> Transfer:
    """The rule of `rollout.branching`. `seed` and `rng` are the tree's.

    `affordable` caps new segments by the budget. `split` divides where the budget is a plug-in; raises ValueError
    when it is missing there.
    """
    if split is None and is_function_path(rollout.branching.budget.kind):
        raise ValueError(f"budget {rollout.branching.budget.kind!r} is a plug-in: pass `split` (plugins.split_of)")
    if rollout.forks:
        return ForkTransfer(rollout)
    if rollout.branching.transfer == "quota":
        return QuotaTransfer(rollout, seed, rng, split)
    return LevelTransfer(rollout, rng, affordable, split)
