"""Empty room of an engine is counted by its cause, and the causes add up to what did not run."""

import pytest

from treepo_mega.monitor.registry import check_known, depends_on_time
from treepo_mega.rollout.admission import Admission
from treepo_mega.rollout.idleness import CAUSES, Idleness, Occupancy, idle_shares


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_did_not_run_has_one_cause():
    clock = Clock()
    idleness = Idleness(clock)
    for seconds, running, cause in ((2, 4, "tail"), (3, 3, "memory"), (1, 2, "refill"), (5, 1, "tail")):
        clock.now += seconds
        idleness.step(Occupancy(running, cause == "memory"), cause)
    clock.now += 4
    idleness.wait("graders")
    counts = idleness.counts(others_s=5)
    # Four slots: 20 s of 4, of which 8 + 9 + 2 + 5 segment-seconds ran.
    assert counts == {
        "room_s": 80, "idle_s/tail": 15, "idle_s/memory": 3, "idle_s/refill": 2, "idle_s/graders": 16,
        "idle_s/tools": 0, "idle_s/engines": 20,
    }  # fmt: skip
    shares = idle_shares(counts)
    assert sum(shares.values()) == pytest.approx(1 - 24 / 80)
    assert set(shares) == {f"rollout/idle_share/{cause}" for cause in CAUSES}
    assert all(check_known(name).unit == "share" and depends_on_time(name) for name in shares)


def test_a_round_without_prompts_has_no_shares():
    assert idle_shares(Idleness(Clock()).counts(others_s=3)) == idle_shares({}) == {}


def test_admission_says_what_ran_and_whether_memory_was_short():
    room = Admission(blocks=9, block_size=8, max_running=3)
    for path in ((0,), (1,), (2,)):
        room.want(0, path, [8], 8)
    room.admit()
    assert room.occupancy == Occupancy(3, blocked=False)
    small = Admission(blocks=4, block_size=8, max_running=3)
    for path in ((0,), (1,), (2,)):
        small.want(0, path, [8], 16)
    small.admit()
    assert small.occupancy == Occupancy(1, blocked=True)
    full = Admission(blocks=9, block_size=8, max_running=2)
    for path in ((0,), (1,), (2,)):
        full.want(0, path, [8], 8)
    full.admit()
    assert full.occupancy == Occupancy(2, blocked=False), "the batch is full: nothing is idle"
