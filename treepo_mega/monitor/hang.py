"""A rank that hangs, and ranks that wait for one: who is where, and every rank's stack before it dies.

    hang = Hang(run_dir, rank=3, world=8, limit_s=2000)
    hang.look()                # by a thread, again and again
    hang.explain(error)        # when a wait for other ranks has failed: where those are, in words

Three ways to a stack, each for what the one before cannot see. A rank whose thread still runs sees the request of
another rank, a file, and writes its own stacks. A rank of the same host whose thread does not run gets SIGUSR2, which
`faulthandler` answers in C. And a timer of `faulthandler`, in C as well, ends a rank whose thread has not looked for
the whole deadline: one that holds the interpreter's lock. Native frames come from py-spy, where that is installed.

Stacks go to RUN_DIR/status/rank_N.stacks and to the rank's log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treepo_mega.errors import RankLost
from treepo_mega.runtime.pulse import Pulse, pulse

REQUEST = "stacks_wanted.json"
STUCK_EXIT_CODE = 2
LEAST_PATIENCE_S = 3.0
"""How long a rank that gives up waits for the stacks of the others, at least."""
MOST_PATIENCE_S = 20.0
NATIVE_S = 20.0
"""Deadline of py-spy."""
LAST_RESORT_S = 60.0
"""After its deadline, a rank whose thread does not run is ended by faulthandler's timer."""
MOST_NAMED = 8
"""Ranks that a message names one by one."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/", "NCCL", "Broken pipe")


class Hang:
    """See the module's page. `interval_s`: how often ranks look."""

    def __init__(self, folder: Path, *, rank: int, world: int, limit_s: float, interval_s: float) -> None:
        self._folder = folder
        self._rank = rank
        self._world = world
        self._limit_s = limit_s
        self._patience_s = min(max(LEAST_PATIENCE_S, 2 * interval_s + 1), MOST_PATIENCE_S)
        self._pulse: Pulse = pulse()
        self._started = time.time()
        self._answered = 0.0
        self._timer_at = -float("inf")
        # Unbuffered and open from now on: faulthandler writes to its descriptor when nothing else works.
        self._stacks = stacks_path(folder, rank).open("w+b", buffering=0)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._rearm()

    def look(self) -> None:
        """Answer a request for stacks; give up when this rank itself shows no progress."""
        self._rearm()
        silent_s = time.monotonic() - self._pulse.at
        if silent_s > self._limit_s:
            self._give_up(silent_s)
        with contextlib.suppress(OSError, ValueError, KeyError):
            request = json.loads((self._folder / REQUEST).read_text(encoding="utf-8"))
            if request["time"] > max(self._started, self._answered) and request["rank"] != self._rank:
                self._answered = request["time"]
                self._write_stacks(f"rank {request['rank']} asked for it")

    def _rearm(self) -> None:
        """Set faulthandler's timer anew, seldom: each setting starts a thread."""
        now = time.monotonic()
        if now - self._timer_at > min(self._limit_s, LAST_RESORT_S) / 4:
            self._timer_at = now
            faulthandler.dump_traceback_later(self._limit_s + LAST_RESORT_S, exit=True, file=self._stacks)

    def _give_up(self, silent_s: float) -> None:
        """End this process: it is stuck. Who waits for it hears of it at once."""
        mine = self._status(self._rank)
        message = (
            f"error (rank {self._rank}): rank {self._rank} on {socket.gethostname()} is stuck: no progress for "
            f"{silent_s:.0f} s (distributed.hang_timeout_s {self._limit_s:g}) in {_where(mine)}, last seen at: "
            f"{self._pulse.waits_for or self._pulse.place}. Stacks of all ranks: {self._folder}/rank_*.stacks. "
            f"{self.others()}"
        )
        print(message, file=sys.stderr, flush=True)
        self.ask_for_stacks()
        self._write_stacks("it is stuck")
        # Not an exception: the thread that is stuck would not see it.
        os._exit(STUCK_EXIT_CODE)

    def explain(self, error: BaseException) -> str | None:
        """What to say when `error` ends this rank: where the others are; None when it is about nothing of theirs."""
        if not is_about_other_ranks(error):
            return None
        # Before the stacks: the others go on meanwhile.
        others = self.others()
        if not is_a_death(error):
            self.ask_for_stacks()
        first = str(error).strip().splitlines()[0]
        return (
            f"in {_where(self._status(self._rank))}: {first}. {others} Stacks of ranks that hung: "
            f"{self._folder}/rank_*.stacks"
        )

    def others(self) -> str:
        """Where the other ranks are by their status files: those that went on least recently first."""
        now = time.time()
        told = []
        for rank in range(self._world):
            if rank == self._rank:
                continue
            status = self._status(rank)
            if not status:
                told.append((0.0, f"rank {rank} has no status file"))
                continue
            words = f"rank {rank} on {status.get('host')} in {_where(status)}"
            if status.get("state") != "running":
                words += f" ({status.get('state')})"
            if wait := status.get("waits_for"):
                words += f", waiting for {wait}"
            words += f", last progress {now - float(status.get('progress', now)):.0f} s ago"
            if now - float(status["time"]) > 3 * self._patience_s:
                words += f", last sign of life {now - float(status['time']):.0f} s ago"
            told.append((float(status.get("progress", now)), words))
        if not told:
            return ""
        told.sort()
        more = f"; {len(told) - MOST_NAMED} more ranks" if len(told) > MOST_NAMED else ""
        return f"Others: {'; '.join(words for _, words in told[:MOST_NAMED])}{more}."

    def ask_for_stacks(self) -> None:
        """Ask all ranks for their stacks, those of this host also by signal; returns after a few seconds."""
        partial = self._folder / f".{REQUEST}.{self._rank}"
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps({"rank": self._rank, "time": time.time()}) + "\n", encoding="utf-8")
            os.replace(partial, self._folder / REQUEST)
        time.sleep(self._patience_s)
        for rank in range(self._world):
            status = self._status(rank)
            here = status.get("host") == socket.gethostname() and status.get("state") == "running"
            if rank != self._rank and here and not self._has_written(rank):
                with contextlib.suppress(OSError):
                    os.kill(int(status["pid"]), signal.SIGUSR2)

    def _has_written(self, rank: int) -> bool:
        with contextlib.suppress(OSError):
            return stacks_path(self._folder, rank).stat().st_size > 0
        return False

    def _status(self, rank: int) -> dict[str, Any]:
        """What a rank's status file says; nothing when there is none of this run."""
        with contextlib.suppress(OSError, ValueError):
            told: dict[str, Any] = json.loads((self._folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            return told
        return {}

    def _write_stacks(self, why: str) -> None:
        """Python's stacks of all threads, and native ones if py-spy is there, to the file and to the log."""
        begin = self._stacks.seek(0, os.SEEK_END)
        head = f"--- rank {self._rank} on {socket.gethostname()}, process {os.getpid()}: stacks, because {why}\n"
        self._stacks.write(head.encode())
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.write(native_stacks(os.getpid()).encode())
        self._stacks.seek(begin)
        # In one write: ranks share a log.
        print(self._stacks.read().decode(errors="replace"), file=sys.stderr, flush=True)

    def close(self) -> None:
        """No timer and no signal from now on."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank's stacks go."""
    return folder / f"rank_{rank}.stacks"


def native_stacks(pid: int, find: Callable[[str], str | None] = shutil.which) -> str:
    """Stacks with native frames by py-spy; a line that says why there are none."""
    spy = find("py-spy")
    if spy is None:
        return "(no native frames: py-spy is not installed)\n"
    try:
        child = subprocess.run(
            [spy, "dump", "--native", "--pid", str(pid)], capture_output=True, text=True, timeout=NATIVE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(no native frames: {error})\n"
    return child.stdout or f"(no native frames: py-spy: {child.stderr.strip()})\n"


def is_about_other_ranks(error: BaseException) -> bool:
    """Whether a wait for another rank failed: our own errors of that kind, and those of torch.distributed."""
    from torch.distributed import DistError

    if isinstance(error, RankLost | DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST)


def is_a_death(error: BaseException) -> bool:
    """Whether the other rank is gone, so that it has no stack to show."""
    text = str(error)
    return any(mark in text for mark in ("Connection closed", "Connection reset", "Broken pipe"))


def _where(status: dict[str, Any]) -> str:
    """Phase and step in words."""
    phase = status.get("phase") or "no phase"
    return f"{phase} of step {status['step']}" if status.get("step") else str(phase)
