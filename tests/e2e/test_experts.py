"""A mixture of experts on ranks that share its experts: killed amid a rollout, it goes on bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.test_stop_and_resume import kill_amid_a_rollout, numbers
from tests.ranks import CLI, run_ranks, start_ranks
from tests.world import REPO

STEPS = 3
LAYOUTS = [
    pytest.param(2, [], id="ep2", marks=pytest.mark.slow),
    pytest.param(
        *(4, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        id="tp2 ep2",
        marks=pytest.mark.matrix,
    ),
]
"""Ranks, and what the recipe lacks for their layout. Four ranks on two cores take minutes."""


def command(model: Path, run_dir: Path, layout: list[str]) -> list[str]:
    """Two of the four experts of each layer a rank; a checkpoint after every step; the auxiliary loss is on."""
    return [
        *("train", "examples/tiny_moe_cpu.yaml", f"model.hf_checkpoint={model}", f"logging.run_dir={run_dir}"),
        *("rollout.rollout_batch_size=4", "rollout.n_samples_per_prompt=8", "train.num_steps_per_rollout=1"),
        *(f"train.num_rollouts={STEPS}", "train.lr_warmup_iters=0", "checkpoint.save_interval=1"),
        *("eval.interval=0", "eval.at_start=false", "eval.max_prompts=8"),
        *layout,
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_a_killed_run_with_shared_out_experts_goes_on_bit_for_bit(tmp_path, ranks, layout):
    model, whole, killed = (tmp_path / name for name in ("model", "whole", "killed"))
    make = [sys.executable, str(REPO / "tools/make_tiny_moe.py"), "--out", str(model)]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    kill_amid_a_rollout(start_ranks(ranks, "-m", "treepo_mega.cli", *command(model, killed, layout)), killed, 2)
    done = len(numbers(killed))
    assert 1 <= done < STEPS
    resumed = run_ranks(ranks, CLI, *command(model, killed, layout), timeout=280)
    assert "resumed from" in resumed
    run_ranks(ranks, CLI, *command(model, whole, layout), timeout=280)
    assert len(numbers(whole)) == STEPS and numbers(killed) == numbers(whole)
    after, before = load_file(killed / "hf" / "model.safetensors"), load_file(model / "model.safetensors")
    expected = load_file(whole / "hf" / "model.safetensors")
    assert after.keys() == expected.keys() == before.keys()
    assert all(after[name].equal(expected[name]) for name in after)
    experts = [name for name in after if ".experts." in name]
    assert len(experts) == 4 * 4 * 3 and all(not after[name].equal(before[name]) for name in experts), (
        "all were trained"
    )
