"""ScaleRL's sigmoid: known curves are found again, and data that say too little are said to."""

import re

import numpy as np
import pytest

from treepo_mega.monitor.scaling_fit import _curve, _slopes, compute_to, fit, saving, value_at

TRUE = (0.3, 0.85, 1.6, 12.0)


def measured(seed: int, *, scale: float = 1.0, noise: float = 0.01, until: float = 100.0):
    compute = np.concatenate([[0.0], np.linspace(2, until, 24)])
    start, asymptote, exponent, midpoint = TRUE
    clean = value_at(compute, start, asymptote, exponent, midpoint * scale)
    return compute, clean + np.random.default_rng(seed).normal(0, noise, len(compute))


@pytest.fixture(scope="module")
def known():
    return fit([measured(1)], draws=80)


def test_a_known_curve_is_found_again(known):
    found = known
    assert found.problem is None
    assert (found.start, found.asymptote) == pytest.approx(TRUE[:2], abs=0.03)
    assert (found.exponent, found.midpoint) == pytest.approx(TRUE[2:], rel=0.25)
    for name, true in zip(("start", "asymptote", "exponent", "midpoint"), TRUE, strict=True):
        low, high = found.intervals[name]
        assert low <= true <= high, name


def test_the_saving_is_the_ratio_of_midpoints_and_lies_in_its_interval():
    baseline = fit([measured(seed) for seed in (1, 2, 3)], draws=80)
    ours = fit([measured(seed, scale=0.5) for seed in (4, 5, 6)], draws=80)
    found = saving(ours, baseline)
    assert not isinstance(found, str)
    assert found.ratio == pytest.approx(0.5, abs=0.06)
    assert found.interval[0] <= found.ratio <= found.interval[1] and found.interval[1] < 0.8
    assert found.ours / found.baseline == pytest.approx(found.ratio)
    assert found.accuracy <= min(ours.last_value, baseline.last_value)


@pytest.mark.parametrize(
    "curve, problem",
    [
        ((np.arange(4.0), np.array([0.1, 0.2, 0.3, 0.4])), "4 points"),
        ((np.arange(20.0), np.full(20, 0.5)), "never changes"),
        ((np.arange(20.0), 0.5 + np.random.default_rng(0).normal(0, 0.05, 20)), "noise|limit|anywhere|before half"),
        (measured(1, until=6.0), "before half of the rise|anywhere"),
        ((np.arange(30.0), np.where(np.arange(30) < 15, 0.2, 0.8)), "limit"),
    ],
)
def test_data_that_say_too_little_are_said_to(known, curve, problem):
    found = fit([curve], draws=40)
    assert found.problem is not None and re.search(problem, found.problem)
    answer = saving(found, known)
    assert isinstance(answer, str) and "this run's fit is not identified" in answer


def test_slopes_are_those_of_the_curve():
    compute = np.array([0.0, 1.0, 12.0, 80.0])
    point = np.array([0.3, 0.85, 1.6, np.log(12.0)])
    for at in range(4):
        step = np.zeros(4)
        step[at] = 1e-6
        numeric = (_curve(compute, *(point + step)) - _curve(compute, *(point - step))) / 2e-6
        assert _slopes(compute, *point)[:, at] == pytest.approx(numeric, abs=1e-8)


def test_there_and_back():
    for value in (0.4, 0.6, 0.84):
        assert value_at(compute_to(value, *TRUE), *TRUE) == pytest.approx(value)
    assert compute_to(0.9, *TRUE) == np.inf and compute_to(0.3, *TRUE) == 0
    assert value_at(0.0, *TRUE) == TRUE[0]
