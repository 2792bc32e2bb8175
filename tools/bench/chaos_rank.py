"""A rank of tools/bench/chaos.py: `treepo-mega`, and a SIGKILL at a moment of one of its phases.

The environment variable TREEPO_CHAOS holds what to kill and when, as JSON: {"phase", "step", "rank", "who", "delay_s",
"note"}. The rank of that number waits until the phase begins, in this step (counted from 1) or a later one, and
`delay_s` seconds more. It then writes a line of what it is about to do to the file `note`, and sends SIGKILL: to itself
("rank"), to all ranks ("all"), to the launcher alone ("launcher"), or to the launcher and all ranks ("node").
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

START_UP = "start-up"
PARTS = {"sampling": "rollout", "waiting for other engines": "rollout", "grading": "reward"}
"""Parts of a phase that count as the phase; the exchange counts as itself."""


class Killer:
    """Waits for its moment, told of every phase and step of this rank."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self._wanted = wanted
        self._step = 0
        self._phase = START_UP
        self._armed = False
        if wanted["phase"] == START_UP:
            self._arm()

    def step(self, step: int) -> None:
        """The step that begins, counted from 1."""
        self._step = step

    def phase(self, name: str | None) -> None:
        """The phase that runs now, or a part of one."""
        self._phase = PARTS.get(name or "", name or "between phases")
        if name == self._wanted["phase"] and self._step >= self._wanted["step"]:
            self._arm()

    def _arm(self) -> None:
        if self._armed:
            return
        self._armed = True
        # A thread: the main one may be in the engine, in a collective or in a system call.
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(self._wanted["delay_s"])
        launcher = os.getppid()
        ranks = [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
        me = os.getpid()
        victims = {
            "rank": [me],
            "all": [*(pid for pid in ranks if pid != me), me],
            "launcher": [launcher],
            "node": [launcher, *(pid for pid in ranks if pid != me), me],
        }[self._wanted["who"]]
        note = {"phase": self._phase, "step": self._step, "time": time.time()}
        with Path(self._wanted["note"]).open("w", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for pid in victims:
            os.kill(pid, signal.SIGKILL)


def watch(killer: Killer) -> None:
    """Let the trainer tell `killer` what it does: its phases, its steps, and the exchange inside the reward phase."""
    from treepo_mega.monitor.timers import Timers
    from treepo_mega.trainer import Trainer

    span: Callable[[Timers, str], AbstractContextManager[None]] = Timers.span
    begin_step: Callable[[Trainer, int], None] = Trainer.begin_step

    def told_span(self: Timers, name: str) -> AbstractContextManager[None]:
        killer.phase(name)
        return span(self, name)

    def told_begin(self: Trainer, step: int) -> None:
        killer.step(step + 1)
        begin_step(self, step)

    Timers.span = told_span  # type: ignore[method-assign]
    Trainer.begin_step = told_begin  # type: ignore[method-assign]


def main() -> int:
    """The command line after the script's name is that of `treepo-mega`."""
    wanted = json.loads(os.environ.get("TREEPO_CHAOS", "null"))
    if wanted is not None and wanted["rank"] == int(os.environ.get("RANK", "0")):
        killer = Killer(wanted)
        watch(killer)
    from treepo_mega.cli import main as treepo_mega

    return treepo_mega(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
