"""What a rank starts ends with the rank, and a rank of torchrun with its launcher: also after SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from treepo_mega.runtime import kin

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""
RANK = """
import os, time
from treepo_mega.runtime.kin import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
ORPHAN = """
import os, time
launcher = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
from treepo_mega.runtime.kin import end_with_launcher
end_with_launcher()
time.sleep(60)
"""
WRITER = """
import multiprocessing, os, time
from megatron.core.dist_checkpointing.strategies import filesystem_async
from treepo_mega.runtime.kin import own_writer_process
if __name__ == "__main__":
    own_writer_process()
    filesystem_async._results_queue.put("a result")
    assert filesystem_async._results_queue.get() == "a result"
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""


def kill_parent_of(script: str, **environment: str) -> psutil.Process:
    """The child of a process that was killed."""
    env = {**os.environ, **environment}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, script], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait(30)
    parent.stdout.close()
    return child


def has_ended(process: psutil.Process, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_rank_ends_with_its_torchrun_and_not_with_a_shell():
    assert has_ended(kill_parent_of(RANK, TORCHELASTIC_RUN_ID="job"))
    alone = kill_parent_of(RANK)
    try:
        assert not has_ended(alone, within_s=1.0)
    finally:
        alone.kill()


@pytest.mark.skipif(kin._runs_python(1), reason="the first process here is Python, as a container's torchrun may be")
def test_a_rank_whose_torchrun_was_killed_while_it_imported_ends_too():
    assert has_ended(kill_parent_of(ORPHAN, TORCHELASTIC_RUN_ID="job"))


def test_megatrons_writer_process_ends_with_the_rank():
    rank = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    helper = psutil.Process(int(rank.stdout.readline()))
    rank.send_signal(signal.SIGKILL)
    rank.wait(30)
    rank.stdout.close()
    assert has_ended(helper)
