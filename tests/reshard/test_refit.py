"""The actor refits a real engine on four ranks: equal to a freshly loaded one; damage is found and named."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize(
    "tied, tp, pp, tp_v",
    [(True, 2, 2, 2), pytest.param(False, 2, 2, 1, marks=pytest.mark.slow)],
)
def test_a_refitted_engine_equals_a_fresh_one_and_damage_is_named(make_tiny_llama, tied, tp, pp, tp_v):
    old, new = (make_tiny_llama(tie_word_embeddings=tied, seed=seed) for seed in (3, 4))
    out = run_ranks(4, WORKER, old, new, tp, pp, tp_v, timeout=280)
    found = json.loads(next(line for line in out.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND "))
    assert found["metrics"]["reshard/buffer_bytes"] <= 2 << 20
    assert "checksums differ in model.layers.1" in found["every time"]
    assert "more than rollout.engine.canary_max_abs_diff = 0.001" in found["every time"]
    assert "a second transfer repaired it" in found["once"]
    assert "every layer group's checksum agrees" in found["in the engine"]
    assert found["warned"] == 1.0
    assert "warning: after the refit" in out and "checksums differ in model.layers.0" in out
    assert found["died"] == "planted"
    assert "the last weight update did not complete" in found["refused"]
