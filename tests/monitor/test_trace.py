"""A trace is a file that Chrome's viewer opens: spans with begin and length, nested by time, one process a rank."""

import json

import pytest

from treepo_mega.config.run import LoggingConfig
from treepo_mega.monitor.timers import Timers
from treepo_mega.monitor.trace import Trace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_and_their_parts_are_spans_on_one_axis(tmp_path):
    clock = Clock()
    timers = Timers(clock, clock)
    timers.trace = Trace(3, clock, lambda: 1000.0)
    with timers("rollout"):
        clock.now += 1
        with timers.span("sampling"):
            clock.now += 2
    timers.trace.write(tmp_path / "trace" / "rank_3.json")
    written = json.loads((tmp_path / "trace" / "rank_3.json").read_text())
    rank, sampling, rollout = written["traceEvents"]
    assert rank == {"name": "process_name", "ph": "M", "pid": 3, "args": {"name": "rank 3"}}
    assert sampling == {"name": "sampling", "ph": "X", "ts": 1001e6, "dur": 2e6, "pid": 3, "tid": 0}
    assert rollout == {"name": "rollout", "ph": "X", "ts": 1000e6, "dur": 3e6, "pid": 3, "tid": 0}
    # Parts are for the trace alone: a metric each would count their phase twice.
    assert timers.pop() == {"timing_s/rollout": 3, "cpu_s/rollout": 3}


def test_without_a_trace_spans_cost_nothing_and_phases_are_timed_all_the_same():
    clock = Clock()
    timers = Timers(clock, clock)
    with timers("rollout"), timers.span("sampling"):
        clock.now += 1
    assert timers.pop() == {"timing_s/rollout": 1, "cpu_s/rollout": 1}


def test_a_span_that_raises_is_drawn(tmp_path):
    clock = Clock()
    trace = Trace(0, clock, lambda: 0.0)

    def fail():
        with trace.span("update"):
            clock.now += 4
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    trace.write(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"][1]["dur"] == 4e6


@pytest.mark.parametrize("steps", [[0, 3], [4, 3]])
def test_steps_that_do_not_ascend_are_refused(steps):
    with pytest.raises(ValueError, match=r"expected \[first, last\] with 1 <= first <= last"):
        LoggingConfig.model_validate({"trace_steps": steps})
