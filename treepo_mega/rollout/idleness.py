"""How much of an engine's room was empty while a round was sampled, and why.

    idleness = Idleness()
    idleness.step(Occupancy(running=12, blocked=False), "tail")     # after each engine step
    idleness.wait("graders")                                        # after a wait with nothing to sample
    totals = idleness.counts(others_s)                              # at the end; additive over engines and rounds
    idle_shares(totals)                                             # metrics: rollout/idle_share/<cause>

Room is counted in segments: the most that ran at once in the round, times its seconds. Where fewer ran, it was empty:

- tail: nothing was left to begin. The last paths end alone.
- memory: segments waited for blocks of the KV cache.
- refill: nothing was left to begin until graders say whether trees that are done are replaced; other trees still ran.
- graders: the same, and nothing ran.
- tools: nothing ran until an environment answered.
- engines: all of this engine had ended, and it waited for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Cause = Literal["tail", "memory", "refill", "graders", "tools", "engines"]
CAUSES: tuple[Cause, ...] = ("tail", "memory", "refill", "graders", "tools", "engines")


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of an engine step: the segments that ran, and whether others waited for blocks of the KV cache."""

    running: int
    blocked: bool


class Idleness:
    """See the module docstring. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._most = 0
        # By cause: seconds, and segment-seconds that ran in them.
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._ran = dict.fromkeys(CAUSES, 0.0)

    def step(self, occupancy: Occupancy, cause: Cause) -> None:
        """Count the time since the last call; `cause`: why no more ran, if so."""
        now = self._clock()
        seconds = now - self._last
        self._last = now
        self._most = max(self._most, occupancy.running)
        self._seconds[cause] += seconds
        self._ran[cause] += seconds * occupancy.running

    def wait(self, cause: Cause) -> None:
        """Count the time since the last call, in which nothing ran."""
        self.step(Occupancy(0, blocked=False), cause)

    def counts(self, others_s: float) -> dict[str, float]:
        """Segment-seconds: `room_s` in all, and `idle_s/<cause>`. `others_s`: seconds of waiting for other engines."""
        seconds = self._seconds | {"engines": self._seconds["engines"] + others_s}
        counts = {f"idle_s/{cause}": self._most * seconds[cause] - self._ran[cause] for cause in CAUSES}
        return counts | {"room_s": self._most * sum(seconds.values())}


def idle_shares(totals: Mapping[str, float]) -> dict[str, float]:
    """The metrics of summed `Idleness.counts`; none where no engine sampled."""
    room = totals.get("room_s", 0.0)
    return {f"rollout/idle_share/{cause}": totals[f"idle_s/{cause}"] / room for cause in CAUSES} if room else {}
