"""Phase timers: wall seconds by phase, handed to the metrics once a step.

    timers = Timers()
    with timers("rollout"):
        ...
    logger.log(step, timers.pop())        # {"timing_s/rollout": 1.23}

A phase entered several times in a step adds up. Phases may nest (`step` around all others). `pop` leaves phases that
are still running alone: they appear in the next `pop` after they end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PREFIX = "timing_s/"


class Timers:
    """Accumulates seconds by phase name. `clock` is for tests: any function that returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._total: dict[str, float] = {}
        self._running: set[str] = set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement as phase `name`, also when it raises.

        Raises RuntimeError when the phase is already running.
        """
        if name in self._running:
            raise RuntimeError(f"timer {name!r} is already running: a phase inside itself would be counted twice")
        self._running.add(name)
        # Wall clock: a phase that only enqueues GPU work must end with something that waits for it. Every phase of the
        # loop does: it ends in a collective, a copy to the host or a barrier.
        start = self._clock()
        try:
            yield
        finally:
            self._running.discard(name)
            self._total[name] = self._total.get(name, 0.0) + self._clock() - start

    def pop(self) -> dict[str, float]:
        """Seconds of the phases that ended since the last `pop`, as metrics; starts again from zero."""
        out = {PREFIX + name: seconds for name, seconds in self._total.items()}
        self._total = {}
        return out
