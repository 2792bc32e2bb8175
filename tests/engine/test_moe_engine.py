"""Mixture-of-experts models in a real vLLM engine: its parameters are those of the map, and written through it in place
they make the engine that is loaded from the files.

The engines live in a forked rank: after an engine of a dense model, vLLM builds none with experts in that process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import found_by, run_ranks

WORKER = Path(__file__).with_name("moe_engine_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_experts_written_by_the_map_are_those_that_are_loaded(tmp_path, kind):
    found = found_by(run_ranks(1, WORKER, tmp_path, kind))
    assert len(found["before"]) == 39 and found["before"] != found["expected"]
    assert found["after"] == found["expected"], "bit for bit"
