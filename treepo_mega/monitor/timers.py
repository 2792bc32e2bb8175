"""Phase timers: wall and CPU seconds by phase, handed to the metrics once a step.

    timers = Timers()
    with timers("rollout"):
        ...
    logger.log(step, timers.pop())        # {"timing_s/rollout": 1.23, "cpu_s/rollout": 1.20}

A phase entered several times in a step adds up. Phases may nest (`step` around all others). `pop` leaves phases that
are still running alone: they appear in the next `pop` after they end.

With a `trace`, every phase is a span of it, too. `span` names parts of a phase that only a trace shows. With a
`profiler`, torch profiles the phases that it wants (`profiler.py`). `waits` and `memory` add what a rank waited in a
phase and the memory that it took: `of_rank`, for comparing ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from treepo_mega.monitor.profiler import PhaseProfiler
from treepo_mega.monitor.trace import Trace

WALL = "timing_s/"
CPU = "cpu_s/"
BUSY = "busy_s/"
WAITED = "waited_s/"
PEAK = "peak_bytes/"


class Memory(Protocol):
    """Peaks of this process's memory."""

    def reset(self) -> None:
        """Begin a new peak."""

    def peak_bytes(self) -> int:
        """The largest since then."""


class Timers:
    """Accumulates seconds by phase name. Clocks are functions that return seconds; tests bring their own.

    `waits`: seconds that this rank has waited for others so far. `memory`: None is not measured.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
        waits: Callable[[], float] | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._clocks = {WALL: clock, CPU: cpu_clock} | ({WAITED: waits} if waits is not None else {})
        self._memory = memory
        self._total: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._running: list[str] = []
        self.trace: Trace | None = None
        """Where phases and parts are drawn now; None: nowhere."""
        self.profiler: PhaseProfiler | None = None
        """What profiles phases; None: nothing."""
        self.watchers: list[Callable[[str | None], None]] = []
        """Told of the innermost phase whenever another one runs; None: none does. Not of ends by exception."""

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
        self._take_peak()
        self._running.append(name)
        self._tell()
        # Wall clock: a phase that only enqueues GPU work must end with something that waits for it. Every phase of the
        # loop does: it ends in a collective, a copy to the host or a barrier.
        start = {prefix: clock() for prefix, clock in self._clocks.items()}
        ended = False
        try:
            with self.span(name):
                yield
            ended = True
        finally:
            for prefix, clock in self._clocks.items():
                self._total[prefix + name] = self._total.get(prefix + name, 0.0) + clock() - start[prefix]
            self._take_peak()
            self._running.remove(name)
            # Whoever explains what was raised has to know the phase: it stays the one that was told last.
            if ended:
                self._tell()

    def _take_peak(self) -> None:
        """Give the peak since the last time to every phase that runs, and begin a new one."""
        if self._memory is None:
            return
        if self._running:
            peak = float(self._memory.peak_bytes())
            for name in self._running:
                self._peaks[PEAK + name] = max(peak, self._peaks.get(PEAK + name, 0.0))
        self._memory.reset()

    def _tell(self) -> None:
        for watcher in self.watchers:
            watcher(self._running[-1] if self._running else None)

    def pop(self) -> dict[str, float]:
        """Seconds of the phases that ended since the last `pop`, as metrics; starts again from zero."""
        out = {name: seconds for name, seconds in self._total.items() if name.startswith((WALL, CPU))}
        self._total = {}
        self._peaks = {}
        return out

    def of_rank(self) -> dict[str, float]:
        """What this rank's phases took since the last `pop`, by BUSY, WAITED and PEAK names; empty without `waits`."""
        if WAITED not in self._clocks:
            return {}
        out = {name: value for name, value in self._peaks.items() if name.removeprefix(PEAK) not in self._running}
        for name, waited in self._total.items():
            if name.startswith(WAITED):
                phase = name.removeprefix(WAITED)
                out |= {name: waited, BUSY + phase: max(0.0, self._total[WALL + phase] - waited)}
        return out
