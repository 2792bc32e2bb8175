"""What pool and worker say to each other, and what the pool remembers of an environment's state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OnError = Literal["observe", "lose"]


@dataclass(frozen=True, slots=True)
class EnvironmentLimits:
    """What a tool may take. Times are wall seconds of one call, sizes of one worker process."""

    num_workers: int = 2
    timeout_s: float = 10.0
    """Of one call of a tool, of reset and of get_reward."""
    startup_timeout_s: float = 60.0
    """Of a worker that starts and imports the class."""
    memory_mb: int = 2048
    """Address space of a worker, and of each process that it starts."""
    max_states: int = 4096
    """States alive at once, over all workers. Others are rebuilt from their history when they are needed."""
    max_processes: int = 64
    """Processes that a worker may have below it after a call. One that has more is ended with all of them."""
    max_observation_chars: int = 8192
    """Longer observations are cut in the middle."""
    on_error: OnError = "observe"
    """What a tool that raises, hangs or dies means: an observation that says so, or a lost trajectory."""
    network: bool = False
    """Whether tools may open network connections."""
    writes_anywhere: bool = False
    """Whether tools may write outside the worker's own temporary directory."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name and its arguments by name, as a model gave them."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """A call that has ended: what was called, the seed of its random numbers, and what it answered."""

    call: ToolCall
    seed: int
    text: str


@dataclass(slots=True, eq=False)
class State:
    """An environment's state, named by its history: the row it began with, and all calls since.

    `home`: the worker that has the object; None: it has to be rebuilt.
    """

    id: int
    row: dict[str, Any]
    seed: int
    opening: str | None = None
    history: list[Done] = field(default_factory=list)
    home: int | None = None
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What has come of a request.

    `texts`: the observations of a turn, one a call. `text`: what reset returned, which may be None. `score`: of
    `grade`. `error`: what went wrong, in words. `lost`: the trajectory cannot go on, or has no reward.
    """

    texts: tuple[str, ...] = ()
    text: str | None = None
    score: float | None = None
    error: str | None = None
    lost: bool = False
    calls: int = 0
    failed_calls: int = 0
    seconds: float = 0.0


def cut_middle(text: str, limit: int) -> str:
    """At most about `limit` characters of `text`: its beginning and its end, and how much is missing between.

    >>> cut_middle("abcdefghij", 4)
    'ab\\n[6 characters left out]\\nij'
    """
    if len(text) <= limit:
        return text
    head = (limit + 1) // 2
    tail = limit - head
    return f"{text[:head]}\n[{len(text) - limit} characters left out]\n{text[len(text) - tail :]}"
