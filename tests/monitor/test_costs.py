"""Seconds of steps, taken apart into what a step costs and what the things in it cost."""

import random
from types import SimpleNamespace

import pytest

from treepo_mega.actor.costs import UpdateCosts
from treepo_mega.monitor.costs import Costs, fitted
from treepo_mega.monitor.registry import check_known
from treepo_mega.rollout.engine_costs import EngineCosts, cost_metrics, of_engine


class Clock:
    """Seconds that a test moves on; CPU time passes half as fast."""

    def __init__(self):
        self.now = 0.0
        self.clocks = {"wall": lambda: self.now, "cpu": lambda: self.now / 2}


def test_costs_that_made_the_seconds_come_back():
    clock = Clock()
    costs = Costs(("step", "token", "request"), clock.clocks)
    rng = random.Random(1)
    for _ in range(200):
        tokens, requests = rng.randrange(1, 64), rng.choice((0, 0, 0, 5))
        clock.now += 0.01 + 0.0002 * tokens + 0.003 * requests
        costs.add(1, tokens, requests)
    expected = {"step": 0.01, "token": 0.0002, "request": 0.003}
    assert fitted(costs.columns, costs.sums(), "wall") == pytest.approx(expected)
    assert fitted(costs.columns, costs.sums(), "cpu") == pytest.approx({name: s / 2 for name, s in expected.items()})
    # Engines' sums add up.
    twice = {name: 2 * value for name, value in costs.sums().items()}
    assert fitted(costs.columns, twice, "wall") == pytest.approx(expected)


def test_nothing_costs_less_than_nothing_and_the_total_is_kept():
    clock = Clock()
    costs = Costs(("step", "token"), clock.clocks)
    for tokens, seconds in ((1, 5.0), (2, 4.0), (3, 3.0)):
        clock.now += seconds
        costs.add(1, tokens)
    assert fitted(costs.columns, costs.sums(), "wall") == pytest.approx({"step": 4.0, "token": 0.0})


def test_what_noise_hides_is_as_expected_and_what_steps_tell_apart_is_not():
    clock = Clock()
    rng = random.Random(3)

    def found(spread: int, noise: float, expected: float) -> float:
        """The fixed part of a step, 1 in truth."""
        costs = Costs(("step", "token"), clock.clocks)
        for _ in range(40):
            tokens = 1000 + rng.randrange(-spread, spread + 1)
            clock.now += (1.0 + 0.001 * tokens) * rng.uniform(1 - noise, 1 + noise)
            costs.add(1, tokens)
        return fitted(costs.columns, costs.sums(), "wall", {"step": expected} if expected else {})["step"]

    plain = [abs(found(50, 0.2, 0.0) - 1) for _ in range(40)]
    helped = [abs(found(50, 0.2, 0.7) - 1) for _ in range(40)]
    assert sum(plain) > 2 * sum(helped)
    # Sizes that differ much say themselves what is fixed, and so do seconds without noise.
    assert found(900, 0.02, 0.1) == pytest.approx(1, abs=0.1)
    assert found(50, 0.0, 0.1) == pytest.approx(1, abs=1e-6)


def test_an_engine_is_charged_for_prompts_once_and_not_for_waits():
    clock = Clock()
    spent = EngineCosts(clock.clocks)
    for step in range(40):
        clock.now += 100.0  # graders
        spent.begin()
        new = 4 if step % 3 == 0 else 0
        for index in range(new):
            # Four branches of one prompt of 21 tokens: it is read once.
            spent.sent(step, (index,), 21)
        running = 4 + step % 5
        clock.now += 0.02 + 0.001 * (running + (20 if new else 0)) + 0.005 * new
        spent.stepped(running)
        spent.done()
    counts = spent.counts()
    assert (counts["engine_steps"], counts["requests"]) == (40, 56)
    assert of_engine(counts | {"generated_tokens": 1}) == counts
    found = cost_metrics(counts)
    assert found["rollout/engine_step_s"] == pytest.approx(0.02)
    assert found["rollout/engine_token_s"] == pytest.approx(0.001)
    assert found["rollout/engine_request_cpu_s"] == pytest.approx(0.0025)
    assert all(check_known(name).unit for name in found)


@pytest.mark.parametrize("pipelined", [False, True])
def test_an_update_is_its_micro_batches_and_what_follows(pipelined):
    clock = Clock()
    costs = UpdateCosts(pipelined=pipelined, clocks=clock.clocks)
    for rollout in range(4):
        # The first rollout warms up: ten times as slow.
        slow = 10 if rollout == 0 else 1
        for sizes in ((100, 60), (80, 50 + rollout, 20)):
            packs = [SimpleNamespace(tokens=[0] * size, local=None) for size in sizes]
            for _, pack in costs.watch(packs):
                clock.now += slow * (0.2 + 0.001 * len(pack.tokens))
            costs.passed()
            clock.now += slow * 0.5
            costs.stepped()
        found = costs.metrics()
        assert found["perf/micro_batches"] == 5
    assert found["perf/update_step_s"] == pytest.approx(0.5)
    assert found["perf/update_micro_batch_s"] == pytest.approx(0.2)
    assert found["perf/update_token_s"] == pytest.approx(0.001)
    assert all(check_known(name).unit for name in found)
