"""Phase timers: wall and CPU seconds by phase, handed to the metrics once a step.

    timers = Timers()
    with timers("rollout"):
        ...
    logger.log(step, timers.pop())        # {"timing_s/rollout": 1.23, "cpu_s/rollout": 1.20}

A phase entered several times in a step adds up. Phases may nest (`step` around all others). `pop` leaves phases that
are still running alone: they appear in the next `pop` after they end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WALL = "timing_s/"
CPU = "cpu_s/"


class Timers:
    """Accumulates seconds by phase name. `clock` and `cpu_clock` are for tests: functions that return seconds."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._clocks = {WALL: clock, CPU: cpu_clock}
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
        start = {prefix: clock() for prefix, clock in self._clocks.items()}
        try:
            yield
        finally:
            self._running.discard(name)
            for prefix, clock in self._clocks.items():
                self._total[prefix + name] = self._total.get(prefix + name, 0.0) + clock() - start[prefix]

    def pop(self) -> dict[str, float]:
        """Seconds of the phases that ended since the last `pop`, as metrics; starts again from zero."""
        out = self._total
        self._total = {}
        return out
