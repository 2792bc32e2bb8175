"""What a rank does now, in a file of its own: RUN_DIR/status/rank_N.json, for `treepo-mega top`.

    status = Status(run_dir, rank=3, world=8, interval_s=2.0)
    timers.watchers.append(status.phase)
    status.step(7, 40)
    status.close("finished")

A thread writes it whenever something changed since the last look, and as a sign of life every BEAT looks: the phase,
the last sign of progress, and what the rank waits for. The file is replaced whole, so that a reader never sees half of
it. A thousand ranks look less often, and the file system hears from about as many of them a second. The same thread
looks whether this rank hangs (`hang.py`).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treepo_mega.errors import RankLost
from treepo_mega.monitor.hang import Hang
from treepo_mega.runtime.pulse import pulse

FOLDER = "status"
BEAT = 5
"""Looks between two signs of life."""
RANKS_A_LOOK = 64
"""Ranks that may write at the interval; more look less often."""


def status_path(run_dir: Path, rank: int) -> Path:
    """The file of a rank."""
    return run_dir / FOLDER / f"rank_{rank}.json"


class Status:
    """See the module's page. `interval_s` 0: nothing is written, and nobody looks whether the rank hangs.

    `hang_timeout_s`: without progress for so long, it does; None: nobody looks.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world: int, interval_s: float, hang_timeout_s: float | None = None
    ) -> None:
        self._path = status_path(run_dir, rank)
        self._interval_s = interval_s * max(1.0, world / RANKS_A_LOOK)
        self._lock = threading.Lock()
        now = time.time()
        self._state: dict[str, Any] = {
            "rank": rank,
            "world": world,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "interval_s": self._interval_s,
            "state": "running",
            "phase": "start-up",
            "since": now,
            "step": 0,
            "of": 0,
            "time": now,
            "progress": now,
            "waits_for": "",
        }
        self._hang: Hang | None = None
        self._done = threading.Event()
        self._changed = True
        self._thread: threading.Thread | None = None
        if interval_s > 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
            if hang_timeout_s is not None:
                self._hang = Hang(
                    self._path.parent, rank=rank, world=world, limit_s=hang_timeout_s, interval_s=self._interval_s
                )
            # A daemon: a rank that dies of an error must not wait for it.
            self._thread = threading.Thread(target=self._run, name="status", daemon=True)
            self._thread.start()

    def phase(self, name: str | None) -> None:
        """The phase that runs now; None: between two."""
        self._set(phase=name or "", since=time.time())

    def step(self, step: int, of: int) -> None:
        """The step that runs now, counted from 1."""
        self._set(step=step, of=of)

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._state |= values
            self._changed = True

    def _run(self) -> None:
        looks = 0
        while not self._done.wait(self._interval_s):
            looks += 1
            # What it has waited for since the last look, not every collective that comes and goes.
            if pulse().waits_for != self._state["waits_for"] and time.monotonic() - pulse().at > self._interval_s:
                self._changed = True
            if self._changed or looks % BEAT == 0:
                self._write()
            if self._hang is not None:
                self._hang.look()

    def _write(self) -> None:
        with self._lock:
            now = time.time()
            self._state["time"] = now
            self._state["progress"] = now - (time.monotonic() - pulse().at)
            self._state["waits_for"] = pulse().waits_for
            self._changed = False
            text = json.dumps(self._state)
        # Not `atomic_file`: its fsync is for what must survive a crash, and would cost a disk its time at every look.
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, self._path)
        except OSError:
            # A full or lost file system shows in the run's own files; a missing sign of life must not end it.
            self._changed = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """An exception inside is written down before it goes on. Raises RankLost in place of one that came of other
        ranks: it says where they are."""
        try:
            yield
        # Also SystemExit and KeyboardInterrupt: whoever looks must not take the rank for alive.
        except BaseException as error:
            # The file may be a look old, and says in which phase this rank is.
            if self._thread is not None:
                self._write()
            told = self._hang.explain(error) if self._hang is not None else None
            self.close(f"failed with {type(error).__name__}")
            if told is None:
                raise
            # With where in our code it was, for a message of torch.distributed does not say what was wanted.
            traceback.print_exc()
            raise RankLost(told) from error

    def close(self, state: str) -> None:
        """Say how it ended, such as "finished"."""
        if self._thread is None:
            return
        self._done.set()
        self._thread.join(timeout=2)
        self._thread = None
        if self._hang is not None:
            self._hang.close()
            self._hang = None
        self._set(state=state, phase="", since=time.time())
        self._write()
