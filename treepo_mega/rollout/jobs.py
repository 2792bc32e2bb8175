"""What goes into a generator and what comes out of it: jobs, grown trees, and who is told of a tree that is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from treepo_mega.config import RolloutConfig
from treepo_mega.data.prompts import Prompt
from treepo_mega.errors import TreepoError
from treepo_mega.rollout.idleness import Occupancy
from treepo_mega.runtime import dist
from treepo_mega.tree.node import Tree


class PromptError(TreepoError):
    """A prompt cannot be sampled on this engine as it is; the message names the prompt and the key to change."""


class StateElsewhere(TreepoError):
    """A carried tree was to go on where its tokens are not; the message names the prompt and who holds them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A tree to grow: a prompt, and the state of its tree when it was carried over from an earlier step.

    `leaves`: how many the tree is to have; None: rollout.n_samples_per_prompt. `begun`: the tree, sampled and graded
    with fewer leaves, that grows on; with a `state`, that of its growth so far. `home`: the rank that speaks for the
    engine whose ranks alone hold the `state` (None on others); None: every rank holds it, or there is none.
    """

    prompt: Prompt
    state: dict[str, Any] | None = None
    leaves: int | None = None
    begun: Tree | None = None
    home: int | None = None

    @property
    def carried(self) -> bool:
        """Whether an earlier step began the tree and left it unfinished."""
        return self.state is not None or self.home is not None


Rewards = Mapping[int, float | str]
"""Of an environment: leaf -> its reward, or why it has none. Leaves that stand in neither are graded by a verifier."""


@dataclass(slots=True)
class Grown:
    """What `grow` made of the jobs it took, by their index: finished trees, and the states of paused ones."""

    trees: dict[int, Tree] = field(default_factory=dict)
    paused: dict[int, dict[str, Any]] = field(default_factory=dict)


class Watcher(Protocol):
    """Told by a generator how far it is, so that others can work meanwhile. Only `settle` blocks; nothing raises."""

    def tree_done(self, index: int, tree: Tree, rewards: Rewards | None) -> None:
        """The tree of job `index` is complete: it does not change any more while others are sampled."""

    def tree_paused(self, index: int, state: dict[str, Any]) -> None:
        """The tree of job `index` goes on in a later step, from this state."""

    def step_done(self, occupancy: Occupancy) -> None:
        """The engine took a step with so many segments."""

    def waited_for_tools(self) -> None:
        """The engine had nothing to do until a tool answered."""

    def settle(self) -> bool:
        """The engine has nothing to do: wait until more is known of trees that are done; False: nothing will be."""


def leaves_of(job: Job, rollout: RolloutConfig) -> int:
    """Leaves that the job's tree is to have."""
    return rollout.n_samples_per_prompt if job.leaves is None else job.leaves


def grows_in_place(job: Job) -> bool:
    """Whether the job's tree grows on in the step that graded it: what it branches from is cached on its engine."""
    return job.begun is not None and not job.carried


def carry(job: Job, state: dict[str, Any] | None, home: int | None) -> Job:
    """The job whose tree goes on in a later step, in the `state` that its engine paused it in; None: on other ranks."""
    return replace(job, state=state, home=home)


def stored(job: Job) -> dict[str, Any]:
    """A carried job, JSON-safe, where its state is; `job_of` is its inverse."""
    begun = None if job.begun is None else job.begun.to_dict()
    return {"prompt": asdict(job.prompt), "state": state_of(job), "leaves": job.leaves, "begun": begun}


def state_of(job: Job) -> dict[str, Any]:
    """The state of a carried tree. Raises StateElsewhere on a rank that does not hold it."""
    if job.state is None:
        raise StateElsewhere(
            f"prompt {job.prompt.id!r} was carried over on the engine of rank {job.home}, and rank {dist.rank()} is to "
            "go on with it: ranks have dealt the step differently. Do they run the same version with the same "
            "configuration?"
        )
    return job.state


def job_of(carried: dict[str, Any]) -> Job:
    """The job that `stored` wrote down. A checkpoint of before trees kept their leaves lacks the last two entries."""
    begun = carried.get("begun")
    prompt = Prompt(**carried["prompt"])
    return Job(prompt, carried["state"], carried.get("leaves"), None if begun is None else Tree.from_dict(begun))


def check_jobs(jobs: Sequence[Job], max_response_len: int, max_model_len: int) -> None:
    """Raise PromptError for an id that stands twice, and for a prompt that does not fit an engine of that window."""
    seen: set[str] = set()
    for prompt in (job.prompt for job in jobs):
        if prompt.id in seen:
            raise PromptError(f"prompt {prompt.id!r} occurs twice in a rollout: its trees would be equal")
        seen.add(prompt.id)
        if not prompt.tokens:
            raise PromptError(f"prompt {prompt.id!r} has no tokens: there is nothing to condition on")
        if len(prompt.tokens) + max_response_len > max_model_len:
            raise PromptError(
                f"prompt {prompt.id!r}: {len(prompt.tokens)} tokens + rollout.max_response_len "
                f"{max_response_len} exceed the engine's window of {max_model_len}"
            )
