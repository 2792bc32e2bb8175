"""The scripts under examples/python run as they stand, and print what the documentation says they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str, timeout: float = 240) -> str:
    """Standard output of an example that must end with status 0."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"examples/python/{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_custom_reward_grades_in_worker_processes():
    lines = run("custom_reward.py").splitlines()
    assert [float(re.findall(r"score ([\d.]+)", line)[0]) for line in lines] == [1.0, 0.25, 0.0, 0.0]
    assert "{'boxed': 0.0}" in lines[-1]


def test_a_reward_server_grades_over_http():
    said = [line.split(None, 1)[1] for line in run("reward_server.py").replace("no idea", "none").splitlines()]
    assert said[:3] == ["score 1.0 {'numbers': 3.0}", "score 0.0 {'numbers': 3.0}", "score 0.0 {'numbers': 0.0}"]
    assert said[3].startswith("lost: reward server 'sums' (http://127.0.0.1:")
    assert said[3].endswith("/score): says: the truth 'thirteen' is no number")


@pytest.mark.slow
def test_a_tree_is_sampled_graded_and_printed():
    text = run("sample_a_tree.py")
    leaves = re.findall(r"reward ([01])  advantage ([+-][\d.]+)", text)
    assert len(leaves) == 8
    unique, flat = map(int, re.findall(r"8 leaves, (\d+) tokens sampled instead of (\d+)", text)[0])
    assert unique < flat, "siblings share their prefix"
    if len({reward for reward, _ in leaves}) == 2:
        best = [float(advantage) for reward, advantage in leaves if reward == "1"]
        worst = [float(advantage) for reward, advantage in leaves if reward == "0"]
        assert min(best) > max(worst)


@pytest.mark.slow
def test_training_runs_from_python_with_the_custom_reward(tmp_path):
    text = run("train_in_python.py", str(tmp_path / "run"))
    assert len(re.findall(r"^step \d: reward", text, re.M)) == 3
    assert "exit code 0" in text
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "rollout/reward_mean" in m]
    # The custom reward gives a quarter for the last digit, so the mean reward is above the share of full marks.
    assert any(m["rollout/reward_mean"] > m["rollout/accuracy"] for m in steps)
    assert all(m["reward/lost"] == 0 for m in steps)
