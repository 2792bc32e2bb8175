"""The actor equals transformers in every layout: logprobs, every parameter's gradient, weights after an update.

One launch a world size runs all of its layouts (see layouts_worker.py); the tests look at what it measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import launch_once, run_ranks

WORKER = Path(__file__).with_name("layouts_worker.py")
RECOMPUTE = ":parallel.recompute_granularity=full,parallel.recompute_method=uniform,parallel.recompute_num_layers=1"
# kind:tied:TP:PP:VPP:SP[:overrides]
CASES = {
    1: ("llama:tied:1:1:1:0", "qwen2:untied:1:1:1:0", "qwen3:tied:1:1:1:0", "llama:tied:1:1:1:0" + RECOMPUTE),
    2: (
        "llama:tied:2:1:1:0",
        "llama:tied:1:2:1:0",  # the tied embedding lies on both stages
        "llama:tied:1:1:1:0",  # two data-parallel ranks
        "qwen2:untied:2:1:1:1",
        "qwen3:tied:1:2:2:0",  # interleaved with two stages: silently wrong with batched p2p
        "qwen3:tied:2:1:1:1" + RECOMPUTE,
        "llama:tied:1:1:1:0:parallel.use_distributed_optimizer=false",
        "llama:tied:1:1:1:0:parallel.overlap_grad_reduce=true",
        "llama:tied:2:1:1:0:model.make_vocab_size_divisible_by=128",  # rank 1 holds nothing but padding
    ),
    4: ("llama:tied:2:2:1:0", "qwen3:tied:2:2:1:1", "qwen2:untied:2:2:2:1", "llama:tied:1:2:2:0"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured(world_size) -> {case: {name: number}}, launched once."""

    @launch_once
    def launch(ranks: int) -> dict[str, dict[str, Any]]:
        directory = tmp_path_factory.mktemp(f"layouts{ranks}")
        run_ranks(ranks, WORKER, directory, *CASES[ranks])
        return json.loads((directory / "results.json").read_text())

    return launch


@pytest.mark.parametrize("ranks, case", [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_equals_transformers(measured, ranks, case):
    got = measured(ranks)[case]
    assert got["logprob_diff"] <= 1e-5
    assert got["perplexity_rel"] <= 1e-5, "transformers' own loss, over all data-parallel ranks"
    assert got["one_text_rel"] <= 1e-5, "other data-parallel ranks have nothing but padding"
    assert got["gradient_diff"] <= 1e-5, "of every parameter, relative"
    assert got["grad_norm_rel"] <= 1e-6
    assert got["loss_diff"] <= 1e-6
    assert got["clipped_by"] > 2, "the update below is a clipped one"
    assert got["weight_diff"] <= 1e-3, "after one update, in units of the learning rate"
    # The first step: the policy is the one that sampled, and the reference is the policy.
    assert (got["max_ratio_diff"], got["ppo_kl"], got["kl_loss"], got["skipped_steps"]) == (0, 0, 0, 0)
    assert got["packs"] > 1, "gradients accumulate over micro-batches"
