"""The curve gate: what a corridor is made of, and that a run outside it is named with curve, step and value."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

GATE = Path(__file__).parents[2] / "tools" / "curve_gate.py"


@pytest.fixture(scope="module")
def gate():
    import sys

    spec = importlib.util.spec_from_file_location("curve_gate", GATE)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["curve_gate"] = module
    spec.loader.exec_module(module)
    return module


def rows_of(gate, shift: float = 0.0, **changed: float) -> list[dict]:
    """A run whose accuracy rises by 0.02 a step from 0.4 + shift."""
    return [
        {
            "step": step,
            "rollout/accuracy": 0.4 + 0.02 * step + shift,
            "train/entropy": 0.1,
            "rollout/logprob_abs_diff_max": 1e-6,
            "cpu_s/step": 1.0,
        }
        | changed
        for step in range(1, gate.STEPS + 1)
    ]


def test_a_corridor_reaches_past_the_recorded_runs_by_the_curve_s_margin(gate):
    corridor = gate.corridor_of({1: rows_of(gate), 2: rows_of(gate, 0.1)})
    accuracy = corridor["curves"]["rollout/accuracy"]
    # The mean over the last three steps is that of the step before.
    assert accuracy["low"][-1] == pytest.approx(0.4 + 0.02 * 9 - 0.06)
    assert accuracy["high"][-1] == pytest.approx(0.5 + 0.02 * 9 + 0.06)
    assert corridor["curves"]["cpu_s/step"] == {"low": [None] * gate.STEPS, "high": [1.75] * gate.STEPS}
    assert gate.departures(rows_of(gate, 0.05), corridor) == []


def test_a_curve_that_leaves_is_named_with_step_value_and_corridor(gate):
    corridor = gate.corridor_of({1: rows_of(gate), 2: rows_of(gate)})
    flat = rows_of(gate)
    for row in flat:
        row["rollout/accuracy"] = 0.42
    (found,) = gate.departures(flat, corridor)
    assert str(found) == "rollout/accuracy: 0.42 at step 6, corridor 0.44 to 0.56"
    assert [each.curve for each in gate.departures(rows_of(gate, **{"cpu_s/step": 2.0}), corridor)] == ["cpu_s/step"]
    assert gate.departures(rows_of(gate, **{"cpu_s/step": 0.1}), corridor) == [], "cheaper is no departure"


def test_a_curve_that_is_missing_or_not_a_number_is_a_departure(gate):
    corridor = gate.corridor_of({1: rows_of(gate)})
    (found,) = gate.departures(rows_of(gate, **{"train/entropy": None}), corridor)
    assert str(found) == "train/entropy: missing at step 1, corridor 0.075 to 0.125"
    assert [each.step for each in gate.departures(rows_of(gate)[:4], corridor)] == [5, 5, 5, 5]
    with pytest.raises(ValueError, match=r"seed 3 has no rollout/accuracy at step 5"):
        gate.corridor_of({3: rows_of(gate)[:4]})


def test_the_status_is_one_outside_and_two_without_a_run(gate, tmp_path, capsys):
    corridor = tmp_path / "corridor.json"
    corridor.write_text(json.dumps(gate.corridor_of({1: rows_of(gate)})))
    for name, shift in (("good", 0.0), ("bad", -0.3)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(gate, shift))
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    held = ["--corridor", str(corridor), "--hold"]
    assert gate.main([*held, str(tmp_path / "good")]) == 0
    assert gate.main([*held, str(tmp_path / "bad")]) == 1
    assert "rollout/accuracy: 0.12 at step 1" in capsys.readouterr().err
    assert gate.main([*held, str(tmp_path / "none")]) == 2


def test_the_stored_corridor_is_of_today_s_recipe_and_curves(gate):
    from treepo_mega.config import load_config

    corridor = json.loads(gate.CORRIDOR.read_text())
    assert corridor["config"] == gate.CONFIG and corridor["overrides"] == gate.OVERRIDES
    assert set(corridor["curves"]) == set(gate.CURVES) and len(corridor["seeds"]) >= 2
    assert all(len(ends["high"]) == gate.STEPS for ends in corridor["curves"].values())
    assert load_config(GATE.parents[1] / gate.CONFIG, gate.OVERRIDES).train.num_rollouts == gate.STEPS
