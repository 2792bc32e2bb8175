"""The phase table adds up to the step, and a profile is a Chrome trace of the phases that were asked for."""

import gzip
import json

import pytest
import torch
from rich.console import Console

from treepo_mega.config.run import LoggingConfig
from treepo_mega.monitor.phases import CAUSES, IDLE, phase_table
from treepo_mega.monitor.profiler import MAX_PHASES, PhaseProfiler
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.timers import Timers


def shown(metrics: dict[str, float]) -> list[list[str]]:
    """The cells of the table's lines."""
    console = Console(width=120, file=None, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(phase_table(metrics, "step 3"))
    lines = [line for line in captured.get().splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_phases_are_shown_longest_first_and_idle_room_by_cause():
    metrics = {"timing_s/step": 10.0, "timing_s/update": 3.0, "timing_s/rollout": 6.0, "cpu_s/update": 2.5}
    # After the step: an evaluation has no share of it.
    metrics |= {"timing_s/eval": 20.0, "cpu_s/eval": 4.0}
    metrics |= {IDLE + cause: share for cause, share in zip(CAUSES, (0.2, 0.0, 0.05, 0.1, 0.0, 0.0), strict=True)}
    assert all(check_known(name) for name in metrics)
    assert shown(metrics) == [
        ["rollout", "6.00", "60.0%", "0.00"],
        ["update", "3.00", "30.0%", "2.50"],
        ["eval", "20.00", "", "4.00"],
        ["between phases", "1.00", "10.0%", ""],
        ["engines: busy", "", "65.0%", ""],
        ["engines idle: nothing left to begin", "1.20", "20.0%", ""],
        ["engines idle: no free KV blocks", "0.00", "0.0%", ""],
        ["engines idle: graders had yet to say what is replaced, others ran", "0.30", "5.0%", ""],
        ["engines idle: the same, nothing ran", "0.60", "10.0%", ""],
        ["engines idle: tools of an environment ran, nothing else", "0.00", "0.0%", ""],
        ["engines idle: waiting for other engines", "0.00", "0.0%", ""],
    ]
    # A step that only evaluated has no phases.
    assert phase_table({"eval/accuracy": 0.5}, "step 0") is None


def test_wanted_steps_are_profiled_phase_by_phase(tmp_path):
    timers = Timers()
    timers.profiler = PhaseProfiler([2], tmp_path, rank=3)
    for step in (1, 2, 3):
        timers.profiler.begin_step(step)
        with timers("step"):
            with timers("rollout"):
                torch.ones(4).sum()
            for _ in range(2):
                with timers("update"):
                    torch.ones(8, 8) @ torch.ones(8, 8)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json.gz"))
    assert names == ["step_2/rank_3_update.json.gz", "step_2/rank_3_update_2.json.gz"]
    events = json.loads(gzip.decompress((tmp_path / names[0]).read_bytes()))["traceEvents"]
    operators = {event["name"] for event in events if event.get("ph") == "X"}
    assert "aten::mm" in operators and "aten::sum" not in operators
    assert set(timers.pop()) == {
        f"{kind}/{name}" for kind in ("timing_s", "cpu_s") for name in ("step", "rollout", "update")
    }


def test_a_step_has_a_bounded_number_of_profiles_and_an_error_goes_through(tmp_path):
    profiler = PhaseProfiler([1], tmp_path, rank=0)
    profiler.begin_step(1)
    with pytest.raises(KeyError), profiler.phase("update"):
        raise KeyError
    for _ in range(MAX_PHASES + 2):
        with profiler.phase("advantage"):
            pass
    assert len(list(tmp_path.rglob("*_advantage*"))) == MAX_PHASES - 1


@pytest.mark.parametrize("steps", [[0], [2, 2], list(range(1, 18))])
def test_steps_that_cannot_be_profiled_are_refused(steps):
    with pytest.raises(ValueError, match=r"at least 1, got|at most 16"):
        LoggingConfig.model_validate({"torch_profiler_steps": steps})
