"""An agent's run: the same on one rank and on two, and when it is killed in the middle of a turn.

The environment is the shipped one with a tool that, once, ends the whole run: a launcher and ranks that die while a
tool works. The run that goes on samples what was in flight again, and ends as the others do. The chat template
hides earlier calls from later turns, which see it so (`environment.history: fork`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import finish, start_ranks
from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.registry import depends_on_time

STEPS = 3
SLOW = """
import os, time
from pathlib import Path

from hidden_number import HiddenNumber

CALLED = Path({called!r})

class Slow(HiddenNumber):
    def ask(self, number: int) -> str:
        '''Compare the hidden number with another one.

        Args:
            number: What to compare with.
        '''
        if not CALLED.exists() and CALLED.parent.joinpath("second").exists():
            CALLED.touch()
            time.sleep(60)
        return super().ask(number)
"""


def command(run_dir: Path, *overrides: str) -> list[str]:
    """Three short steps; a checkpoint after the first."""
    return [
        *("train", "examples/agent_cpu.yaml", f"logging.run_dir={run_dir}", f"train.num_rollouts={STEPS}"),
        *("rollout.rollout_batch_size=8", "checkpoint.save_interval=1", "eval.at_start=false", "eval.max_prompts=16"),
        *("logging.trees_interval=1", "logging.trees_prompts=null", "checkpoint.save_hf=false"),
        *("data.chat_template=examples/tiny_agent/forgets_calls.jinja", "environment.history=fork"),
        *overrides,
    ]


def run(ranks: int, run_dir: Path, *overrides: str) -> None:
    """To its end."""
    code, out = finish(start_ranks(ranks, "-m", "treepo_mega.cli", *command(run_dir, *overrides)), 240)
    assert code == 0, out[-4000:]


def outcome(run_dir: Path) -> tuple[list[dict[str, float]], list[list[dict]]]:
    """Metrics without those that depend on time, and the trees of every step."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    kept = [{name: value for name, value in row.items() if not depends_on_time(name)} for row in rows]
    trees = [
        [json.loads(line) for line in (run_dir / "trees" / f"step_{step:06}.jsonl").read_text().splitlines()]
        for step in range(1, STEPS + 1)
    ]
    return kept, trees


def sampled(steps: list[list[dict]]) -> list[list[tuple]]:
    """Tokens, structure and rewards of all trees, without logprobs."""
    return [
        [(tree["leaves"], tree["rewards"], [(node["path"], node["tokens"], node["stop"]) for node in tree["nodes"]])]
        for trees in steps
        for tree in trees
    ]


def assert_same(one: tuple[list, list], other: tuple[list, list]) -> None:
    """The same trees, token by token, and the same numbers but for their last digits.

    When a tool answers decides which paths share an engine's batch, and so how logprobs are rounded. What does not pass
    through an engine is equal to the bit (`tests/rollout/test_turns.py`).
    """
    assert sampled(one[1]) == sampled(other[1])
    for row, expected in zip(one[0], other[0], strict=True):
        shared = {name for name in expected if name.startswith(("env/", "tree/", "rollout/", "reward/", "eval/"))}
        assert {name: row[name] for name in shared} == pytest.approx(
            {name: expected[name] for name in shared}, rel=1e-4, abs=1e-5
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_and_a_run_killed_amid_a_turn_end_as_one_rank_does(tmp_path):
    run(1, tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    assert whole[0][-1]["env/tool_calls"] > 0
    # The trainer's context of every token is the engine's, whatever was hidden before it.
    assert all(row["rollout/logprob_abs_diff_max"] < 1e-4 and row["env/hidden_tokens"] > 0 for row in whole[0][1:])
    assert any(node.get("observation") for tree in whole[1][0] for node in tree["nodes"])

    run(2, tmp_path / "two")
    assert_same(outcome(tmp_path / "two"), whole)

    killed = tmp_path / "killed"
    called = tmp_path / "called"
    (tmp_path / "hidden_number.py").write_text(Path("examples/environments/hidden_number.py").read_text())
    (tmp_path / "slow.py").write_text(SLOW.format(called=str(called)))
    # The tool leaves a mark outside its own directory.
    slow = (
        f"data.environment={tmp_path}/slow.py:Slow",
        "environment.timeout_s=100",
        "environment.writes_anywhere=true",
    )
    process = start_ranks(1, "-m", "treepo_mega.cli", *command(killed, *slow))
    deadline = time.monotonic() + 200
    while not (killed / "metrics.jsonl").exists() or not (killed / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    (tmp_path / "second").touch()
    while not called.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for member in [launcher, *launcher.children(recursive=True)]:
        member.kill()
    finish(process, 60)
    run(1, killed, *slow)
    assert_same(outcome(killed), whole)
