"""Routing replay: the actor sends tokens to the experts that a real engine chose, in every layout to those given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import found_by, run_ranks

WORKER = Path(__file__).with_name("routing_worker.py")


@pytest.mark.slow
def test_the_update_goes_the_way_of_the_engine(tmp_path):
    found = found_by(run_ranks(1, WORKER, "engine", tmp_path))
    assert found["missing_above_children"] == 0, "what has children was computed, to its last token"
    assert found["trees"] == 3 and found["leaves"] == 24 and found["routings"] > 1000
    assert found["off"]["routing_differs"] > 0, "or this test shows nothing"
    assert found["old"]["routing_differs"] == found["off"]["routing_differs"]
    assert found["all"]["routing_differs"] == 0
    assert found["old"]["mismatch"] == found["all"]["mismatch"] < found["off"]["mismatch"]
    # Told by the optimizer's own step: what the actor would have chosen, and that all rows were replayed.
    assert found["update"]["rollout/routing_noted"] == 1
    assert found["update"]["train/routing_differs"] > 0
    assert found["update_mismatch"] == pytest.approx(found["all"]["mismatch"], rel=1e-3)
    assert "the engine returns no routing: of 4 layers with experts 3 have a router" in found["refused"]
    assert "rollout.routing_replay=off" in found["refused"]


@pytest.mark.slow
def test_every_layout_replays_its_own_tokens_and_layers(tmp_path):
    found = found_by(run_ranks(2, WORKER, "layouts", tmp_path))
    assert len(found) == 6
    for layout, counts in found.items():
        assert counts["differs"] == 0, layout
        assert counts["compared"] > 500 and counts["left"] > 50, layout
        assert counts["routers_unmoved"] == 0, f"{layout}: gradients reach the routers"


@pytest.mark.slow
def test_observations_and_an_engine_over_two_ranks_are_replayed(tmp_path):
    found = found_by(run_ranks(2, WORKER, "turns", tmp_path))
    assert found["observations"] > 10 and found["observed_tokens"] > 200
    assert found["observed_unnoted"] == 0, "what others go on from was read by the engine, to its last token"
    assert found["ranks_differ"] == 0, "both ranks of the engine note all of its routing"
    assert found["routings"] > 1000
    # In fp32 the actor chooses as the engine did, without being told: so what is noted is of the right tokens.
    assert found["off"]["routing_differs"] < 0.005
    assert found["all"]["routing_differs"] == 0
    assert found["all"]["mismatch"] < 1e-4
