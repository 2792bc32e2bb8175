"""Signs of progress of this process: the places that a run passes again and again, and since when it waits for what.

    pulse().beat("engine")              # a forward pass of the engine is about to begin
    with pulse().waiting("generation"):
        ...                             # a wait for other ranks

`monitor/hang.py` looks at them from a thread. `debug.fault` lets this rank get stuck at one of the places.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

from treepo_mega.config.debug import FaultConfig


class Pulse:
    """See the module's page. Times are of `time.monotonic`, seconds."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        """The last sign."""
        self.place = "start-up"
        """Where it was given."""
        self.waits_for = ""
        """What the process waits for now; empty: it does not, as far as it says."""
        self.fault = FaultConfig()
        self._has_fault = False
        self.step = 0
        """The step that runs, counted from 1; 0 before the first."""

    def plant(self, fault: FaultConfig, rank: int) -> None:
        """Let `fault` happen if it is of this rank."""
        self.fault = fault
        self._has_fault = fault.rank == rank

    def beat(self, place: str) -> None:
        """A sign of progress. A planted fault keeps the process here for ever."""
        self.at = time.monotonic()
        self.place = place
        if self.fires(f"stuck_in_{place}"):
            while True:
                time.sleep(60)

    def fires(self, kind: str) -> bool:
        """Whether the planted fault is of this kind and happens now; true once."""
        if not self._has_fault or self.fault.kind != kind or self.step < self.fault.step:
            return False
        self._has_fault = False
        return True

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While the body waits for other ranks to do `what`; its begin and its end are signs of progress."""
        self.beat("collective")
        before, self.waits_for = self.waits_for, what
        try:
            yield
        finally:
            self.waits_for = before
            self.at = time.monotonic()


@functools.cache
def pulse() -> Pulse:
    """This process's own."""
    return Pulse()
