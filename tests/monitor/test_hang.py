"""Who is where when a rank hangs, and the stacks of a rank before it dies: told from files, and by real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from treepo_mega.errors import RankLost, TreepoError
from treepo_mega.monitor.hang import Hang, is_a_death, is_about_other_ranks, native_stacks, stacks_path
from treepo_mega.runtime.pulse import Pulse

STUCK = """
import ctypes, sys, time
from pathlib import Path
from treepo_mega.monitor import hang
from treepo_mega.monitor.status import Status
from treepo_mega.runtime.pulse import pulse
hang.LAST_RESORT_S = 1.0
hang.LEAST_PATIENCE_S = 0.2
status = Status(Path(sys.argv[1]), rank=0, world=1, interval_s=0.1, hang_timeout_s=1.0)
status.step(7, 40)
status.phase("update")
pulse().beat("pack")
def deep_inside():
    # PyDLL keeps the interpreter's lock: no other thread of Python runs any more.
    (ctypes.PyDLL(None) if sys.argv[2] == "native" else ctypes.CDLL(None)).sleep(120)
deep_inside()
"""


@pytest.mark.parametrize("how", ["python", "native"])
def test_a_stuck_rank_writes_its_stack_and_ends(tmp_path, how):
    child = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), how], capture_output=True, text=True, timeout=90
    )
    assert child.returncode == (2 if how == "python" else 1), child.stderr
    stacks = stacks_path(tmp_path / "status", 0).read_text()
    assert "in deep_inside" in stacks
    if how == "python":
        assert "rank 0 on " in child.stderr and "is stuck: no progress for " in child.stderr
        assert "(distributed.hang_timeout_s 1) in update of step 7, last seen at: pack" in child.stderr
        assert "in deep_inside" in child.stderr, "the log has the stack too"


@pytest.fixture
def hang(tmp_path, monkeypatch):
    """Rank 0 of four, whose patience is short."""
    monkeypatch.setattr("treepo_mega.monitor.hang.LEAST_PATIENCE_S", 0.1)
    made = Hang(tmp_path, rank=0, world=4, limit_s=600, interval_s=0.0)
    made._patience_s = 0.1
    yield made
    made.close()


def write_status(folder: Path, rank: int, **changes: object) -> None:
    now = time.time()
    told = {"rank": rank, "host": f"node{rank}", "pid": 1, "state": "running", "phase": "update", "step": 3}
    told |= {"time": now, "progress": now - 1, "waits_for": ""}
    (folder / f"rank_{rank}.json").write_text(json.dumps(told | changes))


def test_the_ranks_that_stand_longest_are_named_first(tmp_path, hang):
    write_status(tmp_path, 0)
    write_status(tmp_path, 1, waits_for="generation")
    write_status(tmp_path, 2, progress=time.time() - 64, phase="rollout")
    write_status(tmp_path, 3, state="failed with PromptError", progress=time.time() - 5)
    assert hang.others() == (
        "Others: rank 2 on node2 in rollout of step 3, last progress 64 s ago; "
        "rank 3 on node3 in update of step 3 (failed with PromptError), last progress 5 s ago; "
        "rank 1 on node1 in update of step 3, waiting for generation, last progress 1 s ago."
    )


def test_an_error_of_a_wait_says_where_the_others_are_and_asks_for_their_stacks(tmp_path, hang):
    for rank in range(3):
        write_status(tmp_path, rank)
    error = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation")
    told = hang.explain(error)
    assert told is not None and told.startswith("in update of step 3: [gloo/transport/")
    assert "Others: rank 3 has no status file; rank 1 on node1 in update of step 3" in told
    assert json.loads((tmp_path / "stacks_wanted.json").read_text())["rank"] == 0
    assert hang.explain(TreepoError("train.lr: expected a number")) is None


def test_a_request_is_answered_once_and_an_old_one_never(tmp_path, hang, capfd):
    def ask(when: float) -> None:
        (tmp_path / "stacks_wanted.json").write_text(json.dumps({"rank": 2, "time": when}))
        hang.look()

    ask(time.time() - 1000)
    assert "rank 2 asked for it" not in capfd.readouterr().err
    asked = time.time() + 1
    for _ in range(2):
        ask(asked)
    assert capfd.readouterr().err.count("rank 2 asked for it") == 1
    assert "test_a_request_is_answered_once" in stacks_path(tmp_path, 0).read_text()


def test_a_rank_of_this_host_gets_a_signal_when_its_thread_does_not_answer(tmp_path, hang):
    write_status(tmp_path, 1, host=socket.gethostname(), pid=os.getpid())
    hang.ask_for_stacks()
    assert "test_a_rank_of_this_host_gets_a_signal" in stacks_path(tmp_path, 0).read_text(), "faulthandler answered"
    assert signal.getsignal(signal.SIGUSR2) is not None


def test_which_errors_are_about_other_ranks():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500")
    assert is_about_other_ranks(lost) and is_a_death(lost)
    assert is_about_other_ranks(RankLost("rank 1 waited")) and not is_a_death(RankLost("rank 1 waited"))
    assert is_about_other_ranks(DistNetworkError("the store is gone"))
    assert not is_about_other_ranks(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_native_frames_come_from_py_spy_or_the_reason_is_told(tmp_path):
    assert "py-spy is not installed" in native_stacks(1, find=lambda name: None)
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho no permission to look at $4 >&2\nexit 1\n")
    spy.chmod(0o755)
    assert native_stacks(77, find=lambda name: str(spy)) == "(no native frames: py-spy: no permission to look at 77)\n"


def test_a_wait_is_named_while_it_lasts_and_the_one_around_it_afterwards():
    pulse = Pulse()
    with pulse.waiting("generation"):
        with pulse.waiting("gather_objects"):
            assert pulse.waits_for == "gather_objects"
        assert pulse.waits_for == "generation"
    assert pulse.waits_for == ""
