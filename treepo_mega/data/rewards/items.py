"""What goes into a reward pool and what comes out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Trajectory(TypedDict):
    """How a response came about; handed to verifiers that have a parameter `trajectory`."""

    prompt_id: str
    tokens: int
    """Of the response, its end mark included."""
    stop: str
    """eos, answer, length, depth or repetition; context where an observation did not fit."""
    turns: int
    """Turns that an environment has answered."""
    segments: int
    """On the path."""
    fallback: bool
    """Whether the path was made by cutting back another one."""


@dataclass(slots=True)
class RewardItem:
    """One answer to grade; fields as in verl's compute_score. `extra_info` must be JSON-safe.

    `trajectory` and `prompt`, the text that was answered, go to verifiers that ask for them.
    """

    verifier: str
    data_source: str
    solution_str: str
    ground_truth: str
    extra_info: dict[str, Any] | None = None
    trajectory: Trajectory | None = None
    prompt: str = ""

    def encode(self, ticket: int, max_chars: int, **more: Any) -> bytes:
        """The request to a worker, with `more` fields. Raises TypeError or ValueError for what is not JSON."""
        fields = {
            "id": ticket,
            "verifier": self.verifier,
            "data_source": self.data_source,
            "solution_str": self.solution_str[-max_chars:],
            "ground_truth": self.ground_truth,
            "extra_info": self.extra_info,
            "trajectory": self.trajectory,
        }
        return json.dumps(fields | more).encode()


@dataclass(slots=True)
class RewardResult:
    """A finite `score`, or None (lost) with the reason in `error`. `extra`: further scalars of the verifier."""

    score: float | None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    wrong_return: bool = False
    """Whether the verifier did return, but no reward."""


class Tally(TypedDict):
    """JSON-safe count of gradings: in all, and of the lost ones by verifier with the first reason."""

    total: int
    lost: dict[str, int]
    reasons: dict[str, str]


@dataclass(slots=True)
class Pending:
    """An item without a result: what the worker is sent, and how often its worker hung or died."""

    verifier: str
    prompt_id: str | None
    payload: bytes
    failures: int = 0
