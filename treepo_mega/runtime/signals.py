"""Being asked to stop: by SIGTERM, by SIGUSR1, or by a file. The loop saves and leaves at the end of its step.

The batch system decides about requeueing; the run leaves with `STOPPED_EXIT_CODE` so that scripts can tell a
planned stop from a failure. Signals reach ranks at different times, so `StopRequest.agreed` asks all ranks.

`touch RUN/stop` needs no right to signal the job, and no knowledge of where it runs. Unlike a signal, the file stays:
a job does not requeue itself, and a run does not start, until somebody has removed it.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from treepo_mega.runtime import dist

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""


class StopRequest:
    """Remembers whether this process was asked to stop. `file`: one whose presence asks too; rank 0 looks for it."""

    def __init__(self, file: Path | None = None) -> None:
        self.requested = False
        self.file = file

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
        # One rank: a shared file system shows a new file to some nodes seconds before others.
        asked = self.requested or (dist.is_main() and self.file is not None and self.file.exists())
        return dist.max_over_ranks({"stop": float(asked)})["stop"] > 0

    def obeyed(self, what: str) -> None:
        """Write `what` into the stop file, if that is what asked: job scripts tell a stop from a failure by it."""
        if dist.is_main() and self.file is not None and self.file.exists():
            self.file.write_text(f"{what}\n", encoding="utf-8")
