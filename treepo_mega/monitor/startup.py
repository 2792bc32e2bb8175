"""Seconds from the start of the process to the first step, by part.

    startup = Startup()
    startup("imports")          # what has passed since the process began
    startup("groups")           # and since the call before
    startup.metrics()           # {"startup_s/imports": 9.1, ..., "startup_s/total": 31.0}; once

Source of the idea: Megatron's users ask for it, because a restart of a thousand GPUs costs their GPU-hours, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from treepo_mega.runtime import dist
from treepo_mega.runtime.pulse import pulse

PREFIX = "startup_s/"


class Startup:
    """See the module's page. `began`: Unix time of the process's begin; None: as the system says."""

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began = psutil.Process().create_time() if began is None else began
        self._last = self._began
        self._parts: dict[str, float] = {}

    def __call__(self, part: str) -> None:
        """`part` ends now: it began when the one before it ended."""
        now = self._clock()
        # A forked rank is as old as its process: never less than nothing, whatever the wall clock does.
        self._parts[PREFIX + part] = max(0.0, now - self._last)
        self._last = now
        pulse().beat(f"start-up, after {part}")

    def metrics(self) -> dict[str, float]:
        """The parts and their total, slowest rank of each; empty from the second call on. Collective over all ranks."""
        if not self._parts:
            return {}
        parts, self._parts = self._parts, {}
        return dist.max_over_ranks(parts | {f"{PREFIX}total": max(0.0, self._last - self._began)})
