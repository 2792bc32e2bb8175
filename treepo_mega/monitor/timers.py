"""Phase timers: wall and CPU seconds by phase, handed to the metrics once a step.

    timers = Timers()
    with timers("rollout"):
        ...
    logger.log(step, timers.pop())        # {"timing_s/rollout": 1.23, "cpu_s/rollout": 1.20}

A phase entered several times in a step adds up. Phases may nest (`step` around all others). `pop` leaves phases that
are still running alone: they appear in the next `pop` after they end.

With a `trace`, every phase is a span of it, too. `span` names parts of a phase that only a trace shows. With a
`profiler`, torch profiles the phases that it wants (`profiler.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from treepo_mega.monitor.profiler import PhaseProfiler
from treepo_mega.monitor.trace import Trace

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
        self.trace: Trace | None = None
        """Where phases and parts are drawn now; None: nowhere."""
        self.profiler: PhaseProfiler | None = None
        """What profiles phases; None: nothing."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """A part of a phase, for the trace alone."""
        return nullcontext() if self.trace is None else self.trace.span(name)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement as phase `name`, also when it raises.

        Raises RuntimeError when the phase is already running.
        """
        if name in self._running:
            raise RuntimeError(f"timer {name!r} is already running: a phase inside itself would be counted twice")
        # Outside: writing a profile is no part of its phase.
        with nullcontext() if self.profiler is None else self.profiler.phase(name):
            yield from self._timed(name)

    def _timed(self, name: str) -> Iterator[None]:
        self._running.add(name)
        # Wall clock: a phase that only enqueues GPU work must end with something that waits for it. Every phase of the
        # loop does: it ends in a collective, a copy to the host or a barrier.
        start = {prefix: clock() for prefix, clock in self._clocks.items()}
        try:
            with self.span(name):
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
