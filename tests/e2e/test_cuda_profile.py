"""A short training run on the scheduler and model runner that CUDA gets, with a real hand-over, on one CPU rank.

`async`: async scheduling and the hand-over of CUDA, whose trees must be those of the CPU's own engine. `cuda`: model
runner V2 as well, which draws its samples from another source of noise, so that its trees are others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import REPO, launch_once
from treepo_mega.engine.cuda_profile import VARIABLE
from treepo_mega.monitor.metrics import read_metrics

pytestmark = pytest.mark.slow

RECIPE = [
    "rollout.rollout_batch_size=2",
    "rollout.n_samples_per_prompt=6",
    "rollout.max_response_len=56",
    *("rollout.dynamic_sampling=false", "rollout.oversample=1", "rollout.surplus=drop"),
    *("rollout.leaves=adaptive", "rollout.first_leaves=2", "rollout.branching.look_alikes=cut"),
    "train.num_rollouts=2",
    "train.num_steps_per_rollout=1",
    "train.lr_warmup_iters=0",
    "eval.at_start=true",
    "eval.at_end=false",
    "eval.max_prompts=2",
    "eval.n_samples_per_prompt=1",
    "checkpoint.save_interval=1",
    "checkpoint.save_hf=false",
    "logging.trees_interval=1",
    "logging.tensorboard=false",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a finished run under an engine profile."""

    @launch_once
    def train(profile: str) -> Path:
        directory = tmp_path_factory.mktemp("profile") / "run"
        arguments = ["train", "examples/tiny_cpu.yaml", *RECIPE, f"logging.run_dir={directory}"]
        # Megatron looks for Triton before the engine is built.
        environment = {"PYTHONPATH": str(REPO), VARIABLE: profile, "TRITON_INTERPRET": str(int(profile == "cuda"))}
        child = subprocess.run(
            [sys.executable, "-m", "treepo_mega.cli", *arguments],
            cwd=REPO,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-6000:]
        return directory

    return train


def trees(directory: Path) -> list[object]:
    files = sorted((directory / "trees").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def rounded(value: object) -> object:
    """Numbers to five digits: another order of summation in a batch shows behind them."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@pytest.mark.parametrize("profile", ["async", "cuda"])
def test_two_steps_with_checkpoints_between_them(run, profile):
    rows = {row["step"]: row for row in read_metrics(run(profile) / "metrics.jsonl")}
    assert sorted(rows) == [0, 1, 2]
    assert all(rows[step]["rollout/logprob_abs_diff_max"] <= 1e-4 for step in (1, 2))
    assert all(row["reshard/canary_abs_diff"] <= 1e-3 for row in rows.values()), "after sleeps that drop the weights"
    assert all(rows[step]["tree/leaves"] + rows[step]["rollout/leaves_unspent"] == 12 for step in (1, 2))
    assert max(rows[step]["tree/leaves_per_prompt_max"] for step in (1, 2)) > 2, "a tree has grown on"


def test_async_scheduling_and_the_real_hand_over_change_no_tree(run):
    assert rounded(trees(run("async"))) == rounded(trees(run("")))
