"""The figures that tools/bench/step.py makes of a run, and what it counts without one."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("step")


def row(seconds: float, **more: float) -> dict[str, float]:
    phases = {"step": seconds, "rollout": 0.6 * seconds, "reward": 0.1 * seconds}
    times = {f"{clock}/{phase}": value for clock in ("cpu_s", "timing_s") for phase, value in phases.items()}
    counts = dict.fromkeys(("forwarded_tokens", "refills", "prompts_trained", "engine_steps", "running_mean"), 8.0)
    return times | {f"rollout/{name}": value for name, value in counts.items()} | more


def test_ratios_compare_rollouts_of_one_release_and_steps_of_two(step: ModuleType):
    waits = {"rollout/engine_grader_wait_share": 0.5}
    rows = {"tree": row(2.0, **waits), "flat": row(4.0), "tree before": row(5.0)}
    rows |= {"tree exact": row(1.0), "flat exact": row(2.0)}
    modes = {name: step.mean_of([step.of_step(found, rounds="before" in name)]) for name, found in rows.items()}
    found = step.verdict(modes, "abc")
    assert (found["ratio_tree_over_flat"], found["ratio_now_over_before"]) == (0.5, 0.4)
    assert (found["ratio_exact_over_flat_exact"], found["ratio_exact_over_before"]) == (0.5, 0.2)
    assert modes["tree"]["idle_share"] == pytest.approx((0.5 * 0.6 + 0.1) / 0.7, abs=1e-4)
    assert modes["tree"]["train_s"] == pytest.approx(0.6)
    assert (modes["tree before"]["refill_rounds"], modes["tree before"]["prompts_replaced"]) == (8, None)
    assert (modes["tree"]["refill_rounds"], modes["tree"]["prompts_replaced"]) == (0, 8)
    assert found["met"] == {"ratio_tree_over_flat": True, "ratio_now_over_before": True, "idle_share": False}


def test_refill_saves_steps_where_lengths_differ_and_none_where_they_do_not(step: ModuleType):
    assert step.planned(0.0, 0.5, draws=50)["ratio"] == 1.0
    assert step.planned(0.9, 0.5, draws=50)["ratio"] < 0.8
