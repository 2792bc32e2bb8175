"""Being asked to stop: SIGTERM and SIGUSR1 set a flag, and the loop saves and leaves at the end of its step.

The batch system decides about requeueing; the run leaves with `STOPPED_EXIT_CODE` so that scripts can tell a
planned stop from a failure. Signals reach ranks at different times, so `StopRequest.agreed` asks all ranks.
"""

from __future__ import annotations

import signal
from types import FrameType

from treepo_mega.runtime import dist

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""


class StopRequest:
    """Remembers whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopRequest:
        """Handle SIGTERM and SIGUSR1 from now on (main thread only); returns self."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Nothing else: a handler runs between two bytecodes of whatever the rank is doing.
        self.requested = True

    def agreed(self) -> bool:
        """True on every rank when any rank was asked. Collective over all ranks."""
        return dist.max_over_ranks({"stop": float(self.requested)})["stop"] > 0
