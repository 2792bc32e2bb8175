"""Grades the trees of an engine while it samples the others, and tells afterwards what came of each.

    grading = Grading(generator.decode, pool, jobs, functions)
    grown = generator.grow(jobs, queue, step=7, watcher=grading)     # trees go to the graders as they are done
    grading.sampling_ended()
    rows = grading.rows(grown.trees, make_row)                       # waits for what is left

The engine never waits for the graders. What comes out depends on neither's speed: rows are made afterwards, in the
order of the trees. So are errors: while one rank raises, the others of its engine would wait for it amid a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from treepo_mega.config import RewardFunction
from treepo_mega.data.rewards import RewardItem, RewardPool, RewardResult, Trajectory
from treepo_mega.data.rewards.weighted import combine, expand
from treepo_mega.rollout.jobs import Job
from treepo_mega.tree.node import Tree
from treepo_mega.tree.regrow import new_leaves

Row = dict[str, Any]
"""What a graded tree is reported as; JSON-safe."""

MakeRow = Callable[[Tree, list[str], list[RewardResult]], Row]
"""Turns (tree, its leaves' texts, what their grading gave) into a row. It may change the tree."""


class Grading:
    """The gradings of one round on one engine; a `Watcher` of its generator. Of a tree that grew on, new leaves alone.

    `decode`: the text of a response's tokens. `functions`: those of `used_functions`. Used once.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        pool: RewardPool,
        jobs: Sequence[Job],
        functions: Sequence[RewardFunction],
    ) -> None:
        self.early = 0
        """Gradings that had ended when sampling did."""
        self._decode = decode
        self._pool = pool
        self._jobs = jobs
        self._functions = functions
        # By the index of the job: what is graded, and the tickets of its answers.
        self._trees: dict[int, Tree] = {}
        self._texts: dict[int, list[str]] = {}
        self._tickets: dict[int, list[int]] = {}
        self._results: dict[int, RewardResult] = {}
        self._error: Exception | None = None

    @property
    def total(self) -> int:
        """Gradings that were asked for: one for each new leaf and function."""
        return sum(map(len, self._tickets.values()))

    def tree_done(self, index: int, tree: Tree) -> None:
        """Send the answers of a finished tree to the graders."""
        if self._error is None:
            self._keep_error(lambda: self._send(index, tree))

    def step_done(self) -> None:
        """Take what the graders have finished, and give them more."""
        if self._error is None:
            self._keep_error(lambda: self._results.update(self._pool.poll()))

    def sampling_ended(self) -> None:
        """Count what has ended until now."""
        self.step_done()
        self.early = len(self._results)

    def rows(self, indices: Iterable[int], make_row: MakeRow) -> dict[int, Row]:
        """Rows of the trees at `indices`, in that order, once all are graded. Raises what the graders met."""
        if self._error is not None:
            raise self._error
        self._results |= self._pool.wait()
        rows: dict[int, Row] = {}
        for index in indices:
            results = combine([self._results[ticket] for ticket in self._tickets[index]], self._functions)
            rows[index] = make_row(self._trees[index], self._texts[index], results)
        return rows

    def _send(self, index: int, tree: Tree) -> None:
        job = self._jobs[index]
        if job.begun is not None:
            tree = new_leaves(tree, job.begun)
        prompt = job.prompt
        responses = [tuple(tree.response(leaf)) for leaf in tree.leaves]
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
        self._tickets[index] = self._pool.submit(expand(items, self._functions))

    def _keep_error(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._error = error
            self._pool.abandon()


def trajectory_of(tree: Tree, leaf: int) -> Trajectory:
    """What a verifier may know of how a response came about."""
    return {
        "prompt_id": tree.prompt_id,
        "tokens": tree.response_length(leaf),
        "stop": str(tree.nodes[leaf].stop),
        "segments": tree.nodes[leaf].depth,
        "fallback": any(tree.nodes[node].fallback for node in tree.ancestry(leaf)),
    }
