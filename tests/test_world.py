"""The world of forked ranks: what a test sees of a rank that raises, dies or hangs, and that nothing is left over."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.ranks import run_ranks
from tests.world import run_world

WORKER = Path(__file__).with_name("world_worker.py")


def test_a_rank_is_fresh_and_has_its_imports_before_it_starts():
    for _ in range(2):
        out = run_ranks(2, WORKER, "fresh", timeout=120)
        assert out.count("megatron imported, no group, 1 thread") == 2, out


def test_a_failed_assertion_shows_the_ranks_traceback():
    with pytest.raises(pytest.fail.Exception, match=r"rank 1 of 2:\nTraceback(.|\n)*AssertionError: planted") as e:
        run_ranks(2, WORKER, "raises", timeout=120)
    assert "before the assertion" in str(e.value), "the output is shown as well"


@pytest.mark.parametrize("how, status", [("dies", -9), ("status", 3)])
def test_a_dead_rank_ends_the_others(how, status, monkeypatch):
    monkeypatch.setattr("tests.world.GRACE_S", 0.5)
    code, out, _ = run_world(2, [str(WORKER), how], 120)
    assert code == status
    check_gone(out)


def test_a_hung_rank_is_killed_at_the_deadline_and_the_next_world_works():
    code, out, failure = run_world(2, [str(WORKER), "hangs"], 6)
    assert code != 0 and "did not end within 6 s" in failure
    check_gone(out)
    assert run_world(1, [str(WORKER), "fresh"], 120)[0] == 0


def check_gone(out: str) -> None:
    """No process that the output names is left."""
    named = [int(line.removeprefix("pid ")) for line in out.splitlines() if line.startswith("pid ")]
    assert named and not any(psutil.pid_exists(pid) for pid in named)
