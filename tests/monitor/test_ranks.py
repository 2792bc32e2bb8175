"""Ranks side by side by hand-made figures, peaks by phase, and start-up by part."""

from __future__ import annotations

import mmap

import pytest

from treepo_mega.monitor.ranks import Ranks, compare
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.startup import Startup
from treepo_mega.monitor.timers import Timers
from treepo_mega.runtime import device, dist

GIB = 2**30


class Machine:
    """A clock, what was waited, and a memory whose peak begins anew at what is used."""

    now = 0.0
    waited = 0.0
    used = GIB
    peak = GIB

    def clock(self) -> float:
        return self.now

    def waits(self) -> float:
        return self.waited

    def work(self, seconds: float, waiting: float = 0.0, peak: int = 0) -> None:
        self.now += seconds + waiting
        self.waited += waiting
        self.peak = max(self.peak, peak)

    def reset(self) -> None:
        self.peak = self.used

    def peak_bytes(self) -> int:
        return self.peak


def of_rank(update_s: float, waiting: float, peak: int) -> dict[str, float]:
    machine = Machine()
    timers = Timers(machine.clock, machine.clock, waits=machine.waits, memory=machine)
    with timers("step"):
        with timers("rollout"):
            machine.work(2.0, peak=3 * GIB)
        with timers("update"):
            machine.work(update_s, waiting, peak)
        with timers("rollout"):
            machine.work(1.0, peak=2 * GIB)
    found = timers.of_rank()
    assert timers.pop()["timing_s/update"] == update_s + waiting
    assert timers.of_rank() == {}, "taken with the times"
    return found


def test_a_slow_rank_is_told_from_those_that_wait_for_it():
    metrics, slow = compare([of_rank(4, 6, 8 * GIB), of_rank(10, 0, 5 * GIB), of_rank(5, 5, 4 * GIB)])
    assert slow == ("update", 1, 10, 5)
    assert (metrics["ranks/slowest"], metrics["ranks/slowest_s"]) == (1, 5)
    assert [metrics[f"ranks/update_busy_s_{what}"] for what in ("p50", "p95", "max")] == [5, 9.5, 10]
    assert metrics["ranks/rollout_busy_s_max"] == 3, "both times together"
    assert metrics["ranks/step_busy_s_max"] == 13
    assert metrics["ranks/idle_share"] == pytest.approx((6 + 0 + 5) / 3 / 13)
    assert metrics["ranks/idle_share_max"] == pytest.approx(6 / 13)
    assert metrics["memory/rollout_peak_gib"] == 3 and metrics["memory/update_peak_gib"] == 8
    assert metrics["memory/step_peak_gib"] == 8, "of the phases within it"
    for name in metrics:
        check_known(name)


def test_one_rank_is_slower_than_nobody():
    metrics, slow = compare([of_rank(4, 0, GIB)])
    assert slow is None and "ranks/slowest" not in metrics and metrics["ranks/idle_share"] == 0
    assert compare([{}]) == ({}, None), "nothing was timed"


def test_the_log_names_rank_host_and_phase(monkeypatch):
    timers = Timers()
    monkeypatch.setattr(dist, "gather_objects", lambda value: ["node1", "node2", "node3"])
    said: list[str] = []
    ranks = Ranks(timers, said.append)
    for seconds, lines in ((10, 0), (10, 0), (5.5, 0), (10, 0), (10, 0), (10, 1), (10, 1)):
        monkeypatch.setattr(dist, "gather_objects", lambda value, s=seconds: [of_rank(s_, 0, GIB) for s_ in (5, s, 5)])
        ranks.metrics(7)
        assert len(said) == lines, "three times in a row, and by more than a tenth of the step"
    assert said == [
        "step 7: rank 1 on node2 is slow for the 3rd step in a row, now busy for 10.0 s in update, the median of all "
        "ranks for 5.0 s"
    ]


def test_what_this_machine_says_of_its_peak():
    memory = device.PeakMemory()
    memory.reset()
    before = memory.peak_bytes()
    # Mapped anew: an allocator may hand out what an earlier test left resident.
    with mmap.mmap(-1, 64 << 20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    after = memory.peak_bytes()
    assert before > 0 and after - before >= 32 << 20
    memory.reset()
    assert memory.peak_bytes() < after, "a new peak begins"


def test_waits_in_collectives_are_counted():
    before = dist.seconds_waited()
    dist.gather_objects({"a": 1})
    assert dist.seconds_waited() > before


def test_start_up_by_part_adds_up_and_is_told_once():
    times = iter([12.0, 15.0, 40.0])
    startup = Startup(began=10.0, clock=lambda: next(times))
    for part in ("imports", "groups", "engine"):
        startup(part)
    found = startup.metrics()
    assert found == {
        "startup_s/imports": 2,
        "startup_s/groups": 3,
        "startup_s/engine": 25,
        "startup_s/total": 30,
    }
    assert all(check_known(name).unit == "s" for name in found)
    assert startup.metrics() == {}
