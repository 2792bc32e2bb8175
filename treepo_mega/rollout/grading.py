"""Grades the trees of an engine while it samples the others, and tells what came of each.

    grading = Grading(generator.decode, pool, jobs, functions, make_row, row_made=tell)
    grown = generator.grow(jobs, queue, step=7, watcher=grading)     # trees go to the graders as they are done
    grading.sampling_ended()
    rows = grading.rows(grown.trees)                                 # waits for what is left

An engine that samples never waits for the graders. Once all gradings of a tree have ended, its row is made, and
`row_made` is told of it: a tree without signal is replaced while others are sampled. A row depends on its tree and its
grades alone, so on nobody's speed. Errors are raised afterwards: while one rank raises, the others of its engine would
wait for it amid a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from treepo_mega.config import RewardFunction
from treepo_mega.data.rewards import RewardItem, RewardPool, RewardResult, Trajectory
from treepo_mega.data.rewards.weighted import combine, expand
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.idleness import Idleness, Occupancy
from treepo_mega.rollout.jobs import Job, Rewards
from treepo_mega.runtime.pulse import pulse
from treepo_mega.text.reward_name import REWARD
from treepo_mega.tree.node import Tree
from treepo_mega.tree.regrow import new_leaves

Row = dict[str, Any]
"""What a graded tree is reported as; JSON-safe."""

MakeRow = Callable[[Tree, list[str], list[RewardResult]], Row]
"""Turns (tree, its leaves' texts, what their grading gave) into a row. It may change the tree."""


class Grading:
    """The gradings of one round on one engine; a `Watcher` of its generator. Of a tree that grew on, new leaves alone.

    `decode`: the text of a response's tokens. `functions`: those of `used_functions`. `row_made(index, row)` is called
    once a tree, when its row is there, and `paused(index, state)` for one that goes on later; neither may raise.
    `replaces`: trees without signal are replaced. Used once.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        pool: RewardPool,
        jobs: Sequence[Job],
        functions: Sequence[RewardFunction],
        make_row: MakeRow,
        *,
        row_made: Callable[[int, Row], None] | None = None,
        paused: Callable[[int, dict[str, Any]], None] | None = None,
        timers: Timers | None = None,
        replaces: bool = False,
    ) -> None:
        self.early = 0
        """Gradings that had ended when sampling did, without those that the engine waited for."""
        self.waited_s = 0.0
        """Seconds in which the engine had nothing to do until graders were done."""
        self._decode = decode
        self._pool = pool
        self._jobs = jobs
        self._functions = functions
        self._make_row = make_row
        self._row_made = row_made
        self._paused = paused
        self._timers = timers or Timers()
        self._replaces = replaces
        self.idleness = Idleness()
        # By the index of the job: what is graded, the tickets of its answers, and how many of them have no result.
        self._trees: dict[int, Tree] = {}
        self._texts: dict[int, list[str]] = {}
        self._tickets: dict[int, list[int]] = {}
        self._missing: dict[int, int] = {}
        self._index_of: dict[int, int] = {}
        self._own_tickets = 0
        self._results: dict[int, RewardResult] = {}
        self._rows: dict[int, Row] = {}
        self._error: Exception | None = None

    @property
    def total(self) -> int:
        """Gradings that were asked for: one for each new leaf and function."""
        return sum(map(len, self._tickets.values()))

    def tree_done(self, index: int, tree: Tree, rewards: Rewards | None) -> None:
        """Send the answers of a finished tree to the graders; `rewards` of an environment are taken as they are."""
        if self._error is None:
            self._keep_error(lambda: self._send(index, tree, rewards or {}))

    def tree_paused(self, index: int, state: dict[str, Any]) -> None:
        """Pass it on."""
        if self._paused is not None:
            self._paused(index, state)

    def step_done(self, occupancy: Occupancy) -> None:
        """Count the step, and look at the graders."""
        waits = self._replaces and bool(self._missing)
        self.idleness.step(occupancy, "memory" if occupancy.blocked else "refill" if waits else "tail")
        self.look()

    def look(self) -> None:
        """Take what the graders have finished, and give them more."""
        if self._error is None:
            before = len(self._results)
            self._keep_error(lambda: self._take(self._pool.poll()))
            self.early += len(self._results) - before

    def waited_for_tools(self) -> None:
        """Count the time, and look at the graders."""
        self.idleness.wait("tools")
        self.look()

    def settle(self) -> bool:
        """Wait until gradings have ended; False when none is left, or they met an error.

        The deadlines of the graders bound the time.
        """
        if self._error is not None or not self._missing:
            return False
        begun = time.monotonic()
        with self._timers.span("waiting for graders"):
            self._keep_error(lambda: self._take(self._pool.wait_any()))
        self.waited_s += time.monotonic() - begun
        self.idleness.wait("graders")
        return self._error is None

    def sampling_ended(self) -> None:
        """Count what has ended until now."""
        self.look()

    def rows(self, indices: Iterable[int]) -> dict[int, Row]:
        """Rows of the trees at `indices`, in that order, once all are graded. Raises what the graders met."""
        pulse().beat("grading")
        if self._error is None:
            self._keep_error(lambda: self._take(self._pool.wait()))
        if self._error is not None:
            raise self._error
        return {index: self._rows[index] for index in indices}

    def _take(self, results: dict[int, RewardResult]) -> None:
        """Results by ticket; rows of the trees that have all of theirs."""
        self._results |= results
        whole = []
        for ticket in results:
            index = self._index_of[ticket]
            self._missing[index] -= 1
            if not self._missing[index]:
                whole.append(index)
        for index in whole:
            self._make(index)

    def _make(self, index: int) -> None:
        """The row of a tree whose gradings have all ended."""
        del self._missing[index]
        graded = combine([self._results[ticket] for ticket in self._tickets[index]], self._functions)
        self._rows[index] = self._make_row(self._trees[index], self._texts.pop(index), graded)
        if self._row_made is not None:
            self._row_made(index, self._rows[index])

    def _send(self, index: int, tree: Tree, rewards: Rewards) -> None:
        job = self._jobs[index]
        if job.begun is not None:
            tree = new_leaves(tree, job.begun)
        prompt = job.prompt
        # Behind an observation, what the policy said last: tools' words are no answer of its own.
        responses = [tuple(tree.turn(leaf)) for leaf in tree.leaves]
        # Leaves of a tree often say the same.
        said = {response: self._decode(response) for response in dict.fromkeys(responses)}
        texts = [said[response] for response in responses]
        items = [
            RewardItem(
                prompt.verifier,
                prompt.data_source,
                text,
                prompt.answer,
                prompt.extra,
                trajectory_of(tree, leaf),
                prompt.text,
            )
            for leaf, text in zip(tree.leaves, texts, strict=True)
        ]
        self._trees[index] = tree
        self._texts[index] = texts
        each = max(1, len(self._functions))
        self._tickets[index] = self._submit(
            expand(items, self._functions), [tree.leaves[at // each] for at in range(len(items) * each)], rewards
        )
        asked = [ticket for ticket in self._tickets[index] if ticket not in self._results]
        self._missing[index] = len(asked)
        self._index_of |= dict.fromkeys(asked, index)
        # A tree that grew on may have no new leaf.
        if not self._missing[index]:
            self._make(index)

    def _submit(self, items: Sequence[RewardItem], leaves: Sequence[int], rewards: Rewards) -> list[int]:
        """A ticket for each item. What the environment says of a leaf has its result at once, under a negative one."""
        tickets: list[int | None] = []
        asked = []
        for item, leaf in zip(items, leaves, strict=True):
            given = rewards.get(leaf)
            # A lost trajectory is not worth a grading by others.
            if item.verifier != REWARD and not isinstance(given, str):
                asked.append(item)
                tickets.append(None)
                continue
            self._own_tickets -= 1
            tickets.append(self._own_tickets)
            self._results[self._own_tickets] = self._pool.note(item.verifier, _result(given))
        others = iter(self._pool.submit(asked))
        return [next(others) if ticket is None else ticket for ticket in tickets]

    def _keep_error(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._error = error
            self._pool.abandon()


def _result(given: float | str | None) -> RewardResult:
    if isinstance(given, float):
        return RewardResult(given)
    return RewardResult(None, given or "the environment was not asked")


def trajectory_of(tree: Tree, leaf: int) -> Trajectory:
    """What a verifier may know of how a response came about."""
    return {
        "prompt_id": tree.prompt_id,
        "tokens": tree.response_length(leaf),
        "stop": str(tree.nodes[leaf].stop),
        "turns": tree.turns(leaf),
        "segments": tree.nodes[leaf].depth,
        "fallback": any(tree.nodes[node].fallback for node in tree.ancestry(leaf)),
    }
