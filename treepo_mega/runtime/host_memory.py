"""How much host memory something takes at its peak.

    with HostPeak() as peak: ...
    peak.bytes

Counts the process's anonymous memory (RssAnon of /proc/self/status), that is what it allocated itself, and not pages
of files it maps, which the kernel takes back whenever it likes. Libraries that are imported meanwhile count. Sampled
every millisecond by a thread, so a peak that is shorter may be missed; Linux only.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

PERIOD_S = 1e-3


class HostPeak:
    """See the module's page. `bytes`: growth over the beginning, at most, so far."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._before = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Measure no longer; the block may go on."""
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            self._take()

    def _sample(self) -> None:
        while not self._done.wait(PERIOD_S):
            self._take()

    def _take(self) -> None:
        self.bytes = max(self.bytes, anonymous_bytes() - self._before)


def anonymous_bytes() -> int:
    """Resident memory of this process that is not backed by a file."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
