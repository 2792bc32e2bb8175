"""Precisions of the head in the real actor: Megatron's optimizer, tensor parallelism, tied embeddings, the guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What training_worker.py saw on two ranks."""
    directory = tmp_path_factory.mktemp("head_training")
    run_ranks(2, Path(__file__).with_name("training_worker.py"), directory)
    return json.loads((directory / "results.json").read_text())


def test_low_precisions_train_near_fp32(results):
    exact = results["norms"]["fp32"]
    for precision, bound in (("bf16", 0.02), ("fp8", 0.15)):
        for got, want in zip(results["norms"][precision], exact, strict=True):
            assert got != want and got == pytest.approx(want, rel=bound), precision


def test_only_an_fp8_head_is_watched(results):
    assert results["fp32"] == results["bf16"] == {}
    seen = results["fp8"]
    assert 0.001 < seen["train/head_logp_abs_diff"] < seen["train/head_logp_abs_diff_max"] < 1
    assert seen["train/head_fallback"] == 0
    assert 0 <= seen["train/head_gate_flips"] < 0.1


def test_the_quantised_weight_is_made_once_a_step_and_never_stale(results):
    """fp8 and bf16 copies for the first pass and after each of two optimizer steps, which write through `.data`."""
    assert results["fresh"]
    assert results["made"] == 4, "old logprobs and first update share theirs; the second update has its own"


def test_a_step_beyond_the_limit_runs_in_bf16_and_is_counted(results):
    assert results["fallen"]["train/head_fallback"] == 1
    assert results["fallen"]["train/head_gate_flips"] == 0
    assert results["norms"]["fallen"] == results["norms"]["bf16"]


def test_logprobs_and_update_may_have_precisions_of_their_own(results):
    assert results["apart"]["train/head_fallback"] == 0
    assert results["apart"]["train/head_logp_abs_diff"] == pytest.approx(results["fp8"]["train/head_logp_abs_diff"])


def test_an_update_without_a_pass_before_it_takes_the_sample_and_falls_back_before_it_steps(results):
    near, far = results["unseen"]["near"], results["unseen"]["far"]
    assert near["metrics"]["train/head_logp_abs_diff"] == pytest.approx(results["fp8"]["train/head_logp_abs_diff"])
    assert near["metrics"]["train/head_fallback"] == 0 and far["metrics"]["train/head_fallback"] == 1
    assert far["norm"] == results["unseen"]["bf16"]["norm"] != near["norm"]
