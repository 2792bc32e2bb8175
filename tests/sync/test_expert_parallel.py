"""An engine whose ranks hold whole experts, refitted by an actor whose ranks do, samples as any other engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engine.moe_engine_worker import write_model
from tests.ranks import found_by, run_ranks

WORKER = Path(__file__).with_name("expert_parallel_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_moe"])
def test_whole_experts_on_each_rank_sample_as_slices_of_all_do(tmp_path, kind):
    old, new = (write_model(tmp_path / str(seed), kind, seed) for seed in (1, 2))
    found = found_by(run_ranks(2, WORKER, old, new, timeout=280))
    assert found["w13"] == [[2, 2 * 64, 128]] * 2, "two of the four experts of each layer, whole"
    assert found["metrics"]["reshard/bytes_over_bound"] == 1.0
    assert found["metrics"]["reshard/canary_abs_diff"] <= 1e-4
    refitted, fresh, sliced = (found[name] for name in ("refitted", "fresh", "sliced"))
    assert refitted == fresh != found["before"], "the experts went to the ranks that vLLM puts them on: bit for bit"
    assert fresh["tokens"] == sliced["tokens"] and fresh["experts"] == sliced["experts"], "each rank routes all tokens"
    differences = [np.abs(np.subtract(*pair)).max() for pair in zip(fresh["logprobs"], sliced["logprobs"], strict=True)]
    assert max(*differences, found["score_diff"]) <= 2e-5
