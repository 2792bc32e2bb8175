"""What a rank does now, in a file of its own: RUN_DIR/status/rank_N.json, for `treepo-mega top`.

    status = Status(run_dir, rank=3, world=8, interval_s=2.0)
    timers.watchers.append(status.phase)
    status.step(7, 40)
    status.close("finished")

A thread writes it whenever something changed since the last look, and as a sign of life every BEAT looks. The file is
replaced whole, so that a reader never sees half of it. A thousand ranks look less often, and the file system hears from
about as many of them a second.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "status"
BEAT = 5
"""Looks between two signs of life."""
RANKS_A_LOOK = 64
"""Ranks that may write at the interval; more look less often."""


def status_path(run_dir: Path, rank: int) -> Path:
    """The file of a rank."""
    return run_dir / FOLDER / f"rank_{rank}.json"


class Status:
    """See the module's page. `interval_s` 0: nothing is written."""

    def __init__(self, run_dir: Path, *, rank: int, world: int, interval_s: float) -> None:
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
        }
        self._done = threading.Event()
        self._changed = True
        self._thread: threading.Thread | None = None
        if interval_s > 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
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
            if self._changed or looks % BEAT == 0:
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._state["time"] = time.time()
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
        """An exception inside is written down before it goes on."""
        try:
            yield
        # Also SystemExit and KeyboardInterrupt: whoever looks must not take the rank for alive.
        except BaseException as error:
            self.close(f"failed with {type(error).__name__}")
            raise

    def close(self, state: str) -> None:
        """Say how it ended, such as "finished"."""
        if self._thread is None:
            return
        self._done.set()
        self._thread.join(timeout=2)
        self._thread = None
        self._set(state=state, phase="", since=time.time())
        self._write()
