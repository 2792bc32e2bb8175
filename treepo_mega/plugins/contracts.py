"""What each kind of plug-in is called with, and what it returns: one Protocol a kind.

Arguments are passed by name. A function must have the parameters without default, and is given those with a default
only if it has them. A parameter of another name needs a default. `tests/plugins` holds every example against these.

A function must be a function of its arguments alone: which rank calls it depends on who sampled the tree. It must not
change what it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from treepo_mega.config import AlgoConfig
from treepo_mega.tree.node import Node, Tree


class Advantage(Protocol):
    """`algo.advantage_estimator`: credit of one graded tree, before whitening."""

    def __call__(
        self, tree: Tree, *, shares: Sequence[float] | None = None, algo: AlgoConfig | None = None
    ) -> Sequence[float]:
        """One finite number a leaf, in the order of `tree.leaves`; or one a node, in that of `tree.nodes`.

        Which of the two is told by the length: a tree has more nodes than leaves. All trees of a run have the same.
        Per node, the number of the root is not used.

        Args:
            tree: `tree.rewards[i]` is the reward of the leaf `tree.leaves[i]`, `tree.verdicts[i]` what the verifier
                said before penalties. `tree.nodes[j]` has tokens, logprobs (nats), parent, children and path.
            shares: [L] what each leaf counts in means (`algo.leaf_weight` descent); None: all alike.
            algo: The section `algo` of the configuration.
        """


class Filter(Protocol):
    """`rollout.filter_metric`: which trees a step trains on, under `rollout.dynamic_sampling`."""

    def __call__(self, tree: Tree, *, step: int = 0) -> bool:
        """True: the step trains on `tree`. False: another prompt is drawn in its place.

        Args:
            tree: As for `Advantage`; it has at least one leaf.
            step: Steps done before this one.
        """


class Budget(Protocol):
    """`rollout.branching.budget.kind`: who gets the branches."""

    def __call__(self, total: int, paths: Sequence[Node], *, temperature: float = 1.0) -> Sequence[int]:
        """How many of `total` each path gets: whole numbers of at least 1 that add up to `total`.

        Args:
            total: At least `len(paths)`. Under `rollout.branching.transfer` level: children. Under quota: leaves.
            paths: Living paths of one tree, in path order: the newest node of each. `logprobs` are those of its
                segment, nats. `peek` are those of the likeliest next tokens, descending, with `signal: branch_point`.
            temperature: `rollout.branching.budget.temperature` of this step.
        """


class Reward(Protocol):
    """`data.verifier`, `data.train.<i>.verifier` and `reward.functions`: the reward of one answer, as in verl.

    It runs in a worker process of its own, with a deadline.
    """

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: Mapping[str, Any] | None,
        *,
        trajectory: Mapping[str, Any] | None = None,
        prompt: str | None = None,
    ) -> float | dict[str, Any]:
        """A finite score; or a dict with "score", whose other numbers are logged as `reward/<name>`.

        It may be `async def`: many calls are then in flight at once (`reward.in_flight`).

        Args:
            data_source: The row's, or its file.
            solution_str: The response, without special tokens.
            ground_truth: The row's truth, as text.
            extra_info: What else the row holds.
            trajectory: prompt_id, tokens, stop, segments, fallback (`data/rewards/items.py: Trajectory`).
            prompt: The text that was answered, chat template included.
        """


class Sink(Protocol):
    """`logging.sinks`: takes the metrics of a step as well. Rank 0 alone calls it."""

    def __call__(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics of `step`; the names stand in docs/metrics.md, None is a number that was not finite.

        A step may be told in several parts, as metrics.jsonl is: what an evaluation or a checkpoint adds comes later.
        """


@dataclass(frozen=True, slots=True)
class Contract:
    """A kind of plug-in: where it is named, and its parameters."""

    kind: str
    key: str
    required: tuple[str, ...]
    optional: tuple[str, ...]

    @classmethod
    def of(cls, kind: str, key: str, protocol: type) -> Contract:
        """The contract that a Protocol writes down."""
        parameters = list(inspect.signature(protocol.__call__).parameters.values())[1:]
        required = tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)
        return cls(kind, key, required, tuple(p.name for p in parameters if p.name not in required))

    def title(self, name: str) -> str:
        """How messages call the plug-in `name` of this kind."""
        return f"{self.kind} plug-in {name!r} ({self.key})"


CONTRACTS = {
    contract.kind: contract
    for contract in (
        Contract.of("advantage", "algo.advantage_estimator", Advantage),
        Contract.of("filter", "rollout.filter_metric", Filter),
        Contract.of("budget", "rollout.branching.budget.kind", Budget),
        Contract.of("reward", "data.verifier", Reward),
        Contract.of("logger", "logging.sinks", Sink),
    )
}
"""Kind to contract."""
