"""A process that outlives what a tool does: it starts the worker, and ends whatever the worker left behind.

    keep(serve)      # in the keeper: returns the exit status once nothing below it is left

Tools may start processes, and those may leave their session, their process group and their parents. All of them stay
below the keeper, which is the reaper of its descendants and runs no code of people's own. SIGTERM ends everything, and
so does the death of the trainer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from treepo_mega.environment.sandbox import become_subreaper

WATCH_S = 1.0
"""Between two looks whether the trainer is alive."""

END_DEADLINE_S = 10.0
"""For ending everything: processes that start others as fast as they die are stopped before they are killed."""

ENDED_BY_TRAINER = 143


def keep(serve: Callable[[], None], parent: int) -> int:
    """Run `serve` in a child and wait for it; then end all that is left. Returns the exit status of a shell.

    Raises RuntimeError when something survives SIGKILL for END_DEADLINE_S.
    """
    become_subreaper()
    watched = {signal.SIGCHLD, signal.SIGTERM}
    # Blocked before the child is there: a signal between would be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        status = 1
        try:
            serve()
            status = 0
        finally:
            # No exit handlers of the keeper's in the child, and no wait for threads that a tool left behind.
            os._exit(status)
    # The pipes are the worker's alone: else the trainer would never read their end.
    for descriptor in (0, 1):
        os.close(descriptor)
    status = _wait(child, watched, parent)
    end_descendants(os.getpid())
    return status


def descendants(pid: int) -> list[int]:
    """Ids of all processes below `pid`, itself not included; those that end meanwhile may be missing."""
    found: list[int] = []
    parents = [pid]
    while parents:
        parent = parents.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = [int(word) for word in (task / "children").read_text().split()]
                found += children
                parents += children
    return found


def end_descendants(pid: int) -> None:
    """SIGKILL all below `pid`, which is this process, until none is left. Raises RuntimeError after END_DEADLINE_S."""
    deadline = time.monotonic() + END_DEADLINE_S
    while True:
        left = descendants(pid)
        # Stopped first: one that starts others could otherwise be faster than the list of its children.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for each in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(each, number)
        if not _reap() and not left:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left[:8]} survived SIGKILL for {END_DEADLINE_S:g} s")
        time.sleep(0.001)


def _wait(child: int, watched: set[signal.Signals], parent: int) -> int:
    while True:
        received = signal.sigtimedwait(watched, WATCH_S)
        if (received is not None and received.si_signo == signal.SIGTERM) or os.getppid() != parent:
            return ENDED_BY_TRAINER
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return code if code >= 0 else 128 - code


def _reap() -> bool:
    """Take the status of children that have ended; returns whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
