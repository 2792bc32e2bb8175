"""The states of one tree's environment, by the turn that they stand behind.

A turn is named by where its path left others, and by the tokens up to its end (`name_of`). Forks cut segments and
fallbacks renumber nodes, and the name stays. So a tree that goes on in another round or step finds its turns again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treepo_mega.environment import State
from treepo_mega.tree.fork import decisions
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

Name = tuple[int, ...]
FIRST: Name = ()
"""Of the state that reset leaves."""


def name_of(tree: Tree, turn: int) -> Name:
    """The name of the turn that ended at node `turn`.

    >>> tree = Tree.start("p", [1])
    >>> tree.add_child(0).tokens = [5, 6]
    >>> tree.observe(1, [7]).id, name_of(tree, 1)
    (2, (0, 0, 2))
    """
    return (*decisions(tree, turn), sum(len(tree.nodes[node].tokens) for node in tree.ancestry(turn)[1:]))


def answered_turns(tree: Tree, node_id: int) -> list[int]:
    """The turns on the path to a node that tools have answered, the first one first.

    A leaf whose observation did not fit is one of them: its tools have acted.
    """
    path = tree.ancestry(node_id)
    turns = [tree.nodes[node].parent for node in path if tree.nodes[node].observation]
    return [*turns, node_id] if tree.nodes[node_id].stop == "context" else turns


@dataclass(slots=True)
class Episode:
    """The states of one tree. `seed`: of the tree; `goes_on`: it had turns before, whose states are gone."""

    rank: int
    prompt: Prompt
    seed: int
    goes_on: bool = False
    states: dict[Name, State] = field(default_factory=dict)
    stateless: set[Name] = field(default_factory=set)
    """Turns whose calls could not be read, so that no tool has acted; noted where a tree goes on."""
    opening: int | None = None
    """The ticket of the first state, while its reset is not answered."""
    failed: str | None = None
    """Why the first state cannot be had."""
    broken: dict[Name, str] = field(default_factory=dict)
    """Turns behind which there is no state any more, and why."""
    wanting: list[Callable[[], None]] = field(default_factory=list)
    """What waits for the first state."""
    replaying: dict[Name, list[Callable[[], None]]] = field(default_factory=dict)
    """Turns that are made again, and what waits for them."""
    missing: int = 0
    rewards: dict[int, float | str] | None = None
    """Leaf -> its reward, or why it has none; None until they are asked for."""

    def name_behind(self, tree: Tree, node_id: int) -> Name:
        """The name of the state that the path of a node has come to, of those that are there.

        Observations that no tool made have no state of their own.
        """
        names = (name_of(tree, turn) for turn in reversed(answered_turns(tree, node_id)))
        return next((name for name in names if name in self.states), FIRST)

    def why_broken(self, tree: Tree, node_id: int) -> str | None:
        """Why no state can be had behind the path of a node; None: it can."""
        if not self.broken:
            return self.failed
        names = [name_of(tree, turn) for turn in answered_turns(tree, node_id)]
        return next((self.broken[name] for name in names if name in self.broken), self.failed)

    def first_gone(self, tree: Tree, node_id: int) -> int | None:
        """The first turn on the path of a node whose state is to be made again; None: all that is needed is there."""
        if not self.goes_on:
            return None
        for turn in answered_turns(tree, node_id):
            name = name_of(tree, turn)
            if name not in self.states and name not in self.stateless:
                return turn
        return None
