"""The phases of some steps as a timeline that chrome://tracing and ui.perfetto.dev open.

    trace = Trace(rank=3)
    with trace.span("sampling"): ...
    trace.write(run_dir / "trace" / "rank3.json")

One file a rank, in Chrome's trace event format: `{"traceEvents": [{"name", "ph": "X", "ts", "dur", "pid", "tid"}]}`,
times in microseconds. `ts` counts from the Unix epoch, so that the files of several ranks lie on one axis when they are
loaded together. Spans nest by time. Source of the format: "Trace Event Format" of the Chromium project.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treepo_mega.runtime.files import atomic_file

MICROSECONDS = 1e6


class Trace:
    """The spans of one process. `clock` is monotonic, `wall` says where its zero lies; both give seconds."""

    def __init__(
        self,
        rank: int,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._rank = rank
        self._clock = clock
        # Asked once: a wall clock that is set back while a run goes on would make spans overlap.
        self._zero = wall() - clock()
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the body of a `with` statement, also when it raises."""
        begun = self._clock()
        try:
            yield
        finally:
            self._events.append(
                {
                    "name": name,
                    "ph": "X",
                    "ts": round((self._zero + begun) * MICROSECONDS, 3),
                    "dur": round((self._clock() - begun) * MICROSECONDS, 3),
                    "pid": self._rank,
                    "tid": 0,
                }
            )

    def write(self, path: Path) -> None:
        """Write all spans so far, replacing an earlier file whole."""
        name = {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": f"rank {self._rank}"}}
        with atomic_file(path) as file:
            json.dump({"traceEvents": [name, *self._events], "displayTimeUnit": "ms"}, file)
