"""Phase timers add up, nest, survive exceptions and hand over once."""

import pytest

from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.timers import Timers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def half(self) -> float:
        """A CPU that works half of the time."""
        return self.now / 2


@pytest.fixture
def clock():
    return Clock()


def test_a_phase_entered_twice_adds_up_and_pop_resets(clock):
    timers = Timers(clock, clock.half)
    for seconds in (1.0, 2.5):
        with timers("rollout"):
            clock.now += seconds
        clock.now += 10
    assert timers.pop() == {"timing_s/rollout": 3.5, "cpu_s/rollout": 1.75}
    assert timers.pop() == {}
    assert check_known("timing_s/rollout")


def test_phases_nest_and_a_running_phase_waits_for_its_end(clock):
    timers = Timers(clock, clock.half)
    with timers("step"):
        with timers("update"):
            clock.now += 2
        clock.now += 1
        assert timers.pop() == {"timing_s/update": 2, "cpu_s/update": 1}
    assert timers.pop() == {"timing_s/step": 3, "cpu_s/step": 1.5}


def test_time_is_kept_when_the_body_raises(clock):
    timers = Timers(clock, clock.half)

    def fail():
        with timers("reward"):
            clock.now += 4
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with timers("reward"):
        clock.now += 1
    assert timers.pop() == {"timing_s/reward": 5, "cpu_s/reward": 2.5}


def test_a_phase_that_an_exception_ends_stays_the_one_that_was_told(clock):
    timers = Timers(clock, clock.half)
    told = []
    timers.watchers.append(told.append)
    with pytest.raises(KeyError), timers("step"), timers("rollout"):
        raise KeyError
    assert told == ["step", "rollout"], "who explains the exception asks where it was"
    with timers("update"):
        pass
    assert told[2:] == ["update", None]


def test_a_phase_inside_itself_is_refused(clock):
    timers = Timers(clock, clock.half)
    with timers("eval"), pytest.raises(RuntimeError, match="'eval' is already running"), timers("eval"):
        pass
    with timers("eval"):
        clock.now += 1
    assert timers.pop() == {"timing_s/eval": 1, "cpu_s/eval": 0.5}
