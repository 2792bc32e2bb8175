"""Turns where several ranks share an engine: the first of them asks the tools, and all hear what it was told.

    turns = SharedTurns(agent, queue, forks=...)       # in place of TurnsInFlight, on each rank of the engine

Ranks of one engine have to make the same moves at the same steps, and tools answer whenever they like. So the first
rank says after each step what was answered until then (`Queue.agree`), and the others take it from there. Nothing is
said while nothing is asked. States of environments live with the first rank alone.

What a turn calls is read from its tokens, which all ranks have. So all know what is asked without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from treepo_mega.rollout.dealing import Queue
from treepo_mega.rollout.jobs import Rewards
from treepo_mega.rollout.turns import SUMS, Agent, Answered, TurnsInFlight
from treepo_mega.tree.history import Observation
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

WHAT = "say what tools answered"
"""What the others wait for, as a message about a lost rank says it."""


class SharedTurns:
    """The turns of one rollout on one engine of several ranks; see `TurnsInFlight`, whose methods these are."""

    def __init__(self, agent: Agent, queue: Queue, *, forks: bool = False) -> None:
        """`queue`: of the engine's prompts, which leads its ranks."""
        self.agent = agent
        self._queue = queue
        self._own = TurnsInFlight(agent, forks=forks) if queue.leads else None
        self.counts: dict[str, float] = dict.fromkeys(SUMS, 0.0) if self._own is None else self._own.counts
        self._trees: dict[int, Tree] = {}
        self._asked = 0
        self._gradings = 0
        self._graded: list[tuple[int, Rewards]] = []

    @property
    def waiting(self) -> bool:
        """Whether anything is asked that is not answered, or answered and not taken: the same on all ranks."""
        return bool(self._asked or self._gradings or self._graded)

    def begin(self, rank: int, prompt: Prompt, seed: int, tree: Tree) -> None:
        """A tree begins, or goes on."""
        self._trees[rank] = tree
        if self._own is not None:
            self._own.begin(rank, prompt, seed, tree)

    def pause(self, rank: int) -> None:
        """The tree goes on in another step."""
        if self._own is not None:
            self._own.pause(rank)

    def ask(self, rank: int, tree: Tree, node_id: int) -> bool:
        """Make the calls of the turn that ended at `node_id`. False: it has none, and is the last."""
        if self._own is not None:
            asked = self._own.ask(rank, tree, node_id)
        else:
            asked = bool(self.agent.counted_calls(tree, node_id))
        self._asked += asked
        return asked

    def grade(self, rank: int, tree: Tree, leaves: Collection[int] | None = None) -> None:
        """Ask what leaves of a complete tree earned."""
        self._gradings += 1
        if self._own is not None:
            self._own.grade(rank, tree, leaves)

    def poll(self) -> list[Answered]:
        """What has been answered since the last call, as the first rank says. DealingTimeout without its word."""
        if not (self._asked or self._gradings):
            return []
        return self._hear([] if self._own is None else self._own.poll())

    def wait(self) -> list[Answered]:
        """As `poll`, once something is answered."""
        return self._hear([] if self._own is None else self._own.wait())

    def take_graded(self) -> list[tuple[int, Rewards]]:
        """(rank, leaf -> reward or the reason why there is none), each once. Only the first rank knows the rewards."""
        graded = self._graded
        self._graded = []
        return graded

    def sums(self) -> dict[str, float]:
        """SUMS of this rollout; of the engine's first rank, which speaks for it."""
        return self.counts if self._own is None else self._own.sums()

    def end(self) -> None:
        """Free the states of trees that did not come to their end: after an error."""
        if self._own is not None:
            self._own.end()

    def _hear(self, answered: list[Answered]) -> list[Answered]:
        graded = [] if self._own is None else self._own.take_graded()
        heard = self._queue.agree([list(map(_said, answered)), [rank for rank, _ in graded]], WHAT)
        if self._own is None:
            answered = [_heard(*word) for word in heard[0]]
            graded = [(rank, {}) for rank in heard[1]]
            for each in answered:
                self._trees[each.rank].counts["tool_errors"] += each.failed_calls
        self._asked -= len(answered)
        self._gradings -= len(graded)
        self._graded += graded
        return answered


def _said(answered: Answered) -> list[Any]:
    """An answer as JSON."""
    seen = answered.observation
    words = None if seen is None else [seen.tokens, seen.hidden, seen.restated]
    return [answered.rank, answered.node_id, words, answered.lost, answered.failed_calls]


def _heard(rank: int, node_id: int, words: list[Any] | None, lost: bool, failed_calls: int) -> Answered:
    """The answer of `_said`."""
    seen = None if words is None else Observation(words[0], words[1], words[2])
    return Answered(rank, node_id, seen, lost, failed_calls)
