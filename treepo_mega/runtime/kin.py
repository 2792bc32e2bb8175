"""Whose death is whose: a rank ends with its launcher, and what a rank starts ends with the rank. Linux's parent-death
signal does it, so that it holds for SIGKILL too.

    end_with_launcher()          # a rank of torchrun
    end_with_parent(pid)         # a child process of a rank, first thing
    own_writer_process()         # before Megatron saves
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from multiprocessing.managers import SyncManager
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent, the process `parent`, ends; at once when that is gone already.

    The kernel means the thread that started this process: only long-lived threads may start children that call this.
    """
    # A system without the call keeps its orphans; the run itself is none the worse.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_with_launcher() -> None:
    """Let this rank end when its torchrun does. Nothing under another launcher or none."""
    # A torchrun that is killed leaves its ranks running: they would write into the directory of the run that resumes.
    # A shell, which starts a single rank, may go before it on purpose (nohup), and srun's daemon ends its tasks itself.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    # Killed before this line, it has left the rank to the system's first process, which is no torchrun.
    if launcher == 1 and not _runs_python(launcher):
        os._exit(1)
    end_with_parent(launcher)


def _runs_python(pid: int) -> bool:
    """Whether the process `pid` is an interpreter; in a container torchrun may be the first process itself."""
    with contextlib.suppress(OSError):
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        return b"python" in os.path.basename(program)
    # It cannot be told: the rank goes on.
    return True


def own_writer_process() -> None:
    """Give Megatron's checkpoint writer its helper process, one that ends with this rank.

    Megatron keeps a manager process for a queue from its first save on. One of its own making outlives a rank that is
    killed, for ever.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=end_with_parent, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()
