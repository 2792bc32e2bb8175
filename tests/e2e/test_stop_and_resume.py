"""A run that is asked to stop, and goes on later, equals one that was left alone: bit for bit, metrics and weights.

Long trees are carried over from step to step, so that a checkpoint has unfinished ones to keep: trunks on their way,
and trees whose branches have started at uncertain steps of reasoning. Leaves are dealt to the prompts with signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import CLI, finish, run_ranks, start_ranks
from treepo_mega.checkpoint.mcore import check_complete
from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.registry import depends_on_time

STEPS = 12


def command(run_dir: Path) -> list[str]:
    """Two ranks, tensor parallel, with a reference model, twice two optimizer steps a rollout, carried-over forks."""
    return [
        *("train", "examples/tiny_cpu.yaml", f"logging.run_dir={run_dir}"),
        *("parallel.tensor_model_parallel_size=2", "rollout.rollout_batch_size=8", "rollout.n_samples_per_prompt=8"),
        *(
            "rollout.partial_rollout=24",
            *("rollout.branching.at=fork", "rollout.branching.fork.draw=other", "rollout.branching.fork.waves=2"),
            *("rollout.segment.length=12", "rollout.segment.end=[';']", "rollout.branching.initial=[2,2]"),
            *("rollout.leaves=adaptive", "rollout.first_leaves=4"),
            "train.prefix_sharing=tree",
            "algo.kl_loss_coef=0.05",
            "train.ppo_epochs=2",
            f"train.num_rollouts={STEPS}",
            "eval.at_start=false",
            "eval.max_prompts=8",
        ),
    ]


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a torchrun started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, timeout=30)
    return [int(x) for x in listed.stdout.split()]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """The run's metrics without those that depend on time."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not depends_on_time(k)} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start_ranks(2, "-m", "treepo_mega.cli", *command(stopped))
    metrics, deadline = stopped / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    # To one rank only: the other must learn of it.
    os.kill(ranks_of(process.pid)[-1], signal.SIGUSR1)
    code, out = finish(process, 120)
    assert "asked to stop: saved after step" in out, out[-6000:]
    assert code != 0 and "exitcode  : 75" in out, "the status that job scripts requeue on"
    (saved,) = (stopped / "checkpoints").iterdir()
    done = check_complete(saved)["step"]
    assert 1 <= done < STEPS and done == len(numbers(stopped))
    assert numbers(stopped)[-1]["rollout/trees_carried_over"] > 0, "the checkpoint keeps unfinished trees"

    before = metrics.read_text().splitlines()
    resumed = run_ranks(2, CLI, *command(stopped), timeout=280)
    assert "resumed from" in resumed and f"next step {done}" in resumed
    after = metrics.read_text().splitlines()
    assert after[:done] == before and json.loads(after[done])["step"] == done + 1, "the first lines are kept as written"
    run_ranks(2, CLI, *command(whole), timeout=280)
    assert numbers(stopped) == numbers(whole)
    assert len(numbers(whole)) == STEPS
    assert sum(row["rollout/trees_carried_over"] for row in numbers(whole)) > STEPS, "checkpoints keep unfinished trees"
    assert any(row["rollout/stale_token_share"] > 0.1 for row in numbers(whole))
    assert all(row["tree/forks"] > 0 for row in numbers(whole) if row["rollout/prompts_trained"])
    assert max(row["tree/leaves_per_prompt_max"] for row in numbers(whole)) > 8, "some trees have grown on"
    a, b = (load_file(d / "hf" / "model.safetensors") for d in (stopped, whole))
    assert a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)
