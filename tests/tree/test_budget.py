"""The branching budget: bounds, fairness, and the published numbers of a binary tree."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.config.rollout import BudgetConfig
from treepo_mega.tree.budget import (
    budget_weights,
    divergence,
    level_budget,
    mean_logprob,
    reach_floor,
    softmax_weights,
    split_by_weight,
    split_equally,
    standings,
)


@pytest.mark.parametrize(
    "active, finished, just_finished, total",
    [
        (2, 0, 0, 4),
        (4, 0, 0, 8),
        (3, 1, 1, 8),
        (1, 3, 3, 8),
        (8, 0, 0, 16),
        (16, 0, 0, 16),
        (2, 14, 6, 2),
        (1, 15, 1, 1),
    ],
)
def test_level_budget_of_a_binary_tree_of_width_16(active, finished, just_finished, total):
    assert level_budget(active, finished, just_finished, 16, 2) == total


@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_every_living_path_gets_a_child_and_the_width_is_kept(width, branch_factor, data):
    active = data.draw(st.integers(1, width))
    finished = data.draw(st.integers(0, width - active))
    just = data.draw(st.integers(0, finished))
    total = level_budget(active, finished, just, width, branch_factor)
    assert active <= total <= width - finished
    shares = split_equally(total, active, random.Random(0))
    assert sum(shares) == total and min(shares) >= 1 and max(shares) - min(shares) <= 1


def test_the_remainder_goes_to_every_place_equally_often():
    hits: Counter[int] = Counter()
    rng = random.Random(7)
    for _ in range(3000):
        shares = split_equally(5, 3, rng)
        hits.update(i for i, n in enumerate(shares) if n == 2)
    assert all(abs(hits[i] - 2000) < 150 for i in range(3)), hits


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="exceed the width"):
        level_budget(3, 14, 0, 16, 2)
    with pytest.raises(ValueError, match="cannot give"):
        split_equally(2, 3, random.Random(0))


@pytest.mark.parametrize(
    "total, weights, expected",
    [
        (4, [0.5, 0.5], [2, 2]),
        (5, [0.5, 0.5], [3, 2]),  # a tie goes to the earlier path
        (16, [0.9, 0.1], [14, 2]),  # 14 to share: 12.6 and 1.4
        (8, [0.5, 0.3, 0.2], [4, 2, 2]),  # 5 to share: 2.5, 1.5, 1.0; the tie again
        (3, [1.0, 0.0, 0.0], [1, 1, 1]),
        (7, [0.0, 1.0, 0.0], [1, 5, 1]),
        (9, [1.0], [9]),
    ],
)
def test_largest_remainder_by_hand(total, weights, expected):
    assert split_by_weight(total, weights) == expected


@given(st.lists(st.floats(-60, 0), min_size=1, max_size=20), st.integers(0, 40), st.floats(1e-3, 100), st.booleans())
def test_a_weighted_split_is_a_monotone_quota(xs, extra, temperature, low):
    weights = softmax_weights(xs, temperature, favour_low=low)
    assert math.isclose(math.fsum(weights), 1.0)
    shares = split_by_weight(len(xs) + extra, weights)
    assert sum(shares) == len(xs) + extra and min(shares) >= 1
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - 1 - extra * weight) < 1 + 1e-6, "a largest-remainder share is within one of the exact share"
    for i, x in enumerate(xs):
        for j, y in enumerate(xs):
            if (x < y if low else x > y) and abs(weights[i] - weights[j]) > 1e-9:
                assert shares[i] >= shares[j]


def test_equal_certainty_is_an_equal_split_with_ties_in_path_order():
    weights = softmax_weights([-0.7] * 7, 2.0, favour_low=True)
    assert split_by_weight(7 + 7 + 3, weights) == [3, 3, 3, 2, 2, 2, 2]


def test_weights_are_the_papers_softmax():
    xs, tau = [-2.0, -0.5, -1.0], 2.0
    exact = [math.exp(-(x - min(xs)) / tau) for x in xs]
    assert softmax_weights(xs, tau, favour_low=True) == pytest.approx([e / sum(exact) for e in exact])
    exact = [math.exp((x - min(xs)) / tau) for x in xs]
    assert softmax_weights(xs, tau, favour_low=False) == pytest.approx([e / sum(exact) for e in exact])
    assert mean_logprob([-1.0, -2.0]) == -1.5
    with pytest.raises(ValueError, match="without tokens"):
        mean_logprob([])
    with pytest.raises(ValueError, match="cannot give"):
        split_by_weight(1, [0.5, 0.5])


def budget(**keys: object) -> BudgetConfig:
    return BudgetConfig(**keys)


certainties = st.lists(st.floats(-20, 0), min_size=1, max_size=12)
scales = st.sampled_from(["share", "rank", "zscore"])
kinds = st.sampled_from(["low_prob", "high_prob", "entropy"])


def test_the_papers_setting_is_the_papers_softmax_and_entropy_is_shared_out_by_itself():
    xs = [-2.0, -0.5, -1.0]
    assert budget_weights(xs, budget(kind="low_prob")) == softmax_weights(xs, 2.0, favour_low=True)
    assert budget_weights(xs, budget(kind="high_prob")) == softmax_weights(xs, 2.0, favour_low=False)
    assert budget_weights(xs, budget(kind="entropy")) == pytest.approx([2 / 3.5, 0.5 / 3.5, 1 / 3.5])


def test_standings_by_hand():
    xs = [-0.3, -0.1, -0.3, -0.5]
    assert standings(xs, budget(kind="entropy", scale="nats")) == [0.3, 0.1, 0.3, 0.5]
    assert standings(xs, budget(kind="entropy")) == pytest.approx([1.0, 1 / 3, 1.0, 5 / 3])
    assert standings(xs, budget(kind="entropy", scale="rank")) == [0.75, 0.25, 0.75, 1.0]
    assert standings(xs, budget(kind="high_prob", scale="rank")) == [0.75, 1.0, 0.75, 0.25]
    deviation = math.sqrt(0.02)
    assert standings(xs, budget(kind="low_prob", scale="zscore")) == pytest.approx(
        [0.0, -0.2 / deviation, 0.0, 0.2 / deviation]
    )


@given(certainties, st.floats(1e-3, 1e3), kinds, scales)
def test_other_scales_do_not_see_how_large_uncertainties_are(xs, factor, kind, scale):
    """A thousandth of every uncertainty gives the same weights; the softmax in nats levels them."""
    if kind == "high_prob" and scale == "share":
        return
    before = budget_weights(xs, budget(kind=kind, scale=scale, temperature=1.0))
    spread = max(xs) - min(xs)
    assert math.isclose(math.fsum(before), 1.0)
    # Differences that drown in rounding, and the guard against them, are no scale.
    if spread * min(1.0, factor) > 1e-6 or spread == 0:
        scaled = budget_weights([x * factor for x in xs], budget(kind=kind, scale=scale, temperature=1.0))
        assert scaled == pytest.approx(before, rel=1e-6, abs=1e-9)


@given(certainties, kinds, scales, st.floats(0, 1))
def test_some_border_always_reaches_a_relative_floor(xs, kind, scale, floor):
    asked = floor - 1.0 if scale == "zscore" else floor
    chosen = reach_floor(xs, budget(kind=kind, scale=scale, floor=asked))
    assert any(chosen)
    favour = standings(xs, budget(kind=kind, scale=scale))
    assert all(
        one <= other
        for one, no in zip(favour, chosen, strict=True)
        if not no
        for other, yes in zip(favour, chosen, strict=True)
        if yes
    )


def test_divergence_is_0_for_any_equal_split_and_counts_what_was_kept():
    rng = random.Random(0)
    for total, paths in ((16, 8), (7, 3), (5, 5), (9, 1), (23, 7)):
        assert divergence(split_equally(total, paths, rng), total) == 0.0
    assert divergence([1, 7], 8) == divergence([7, 1], 8) == 3 / 8
    assert divergence([1, 1], 8) == 6 / 8
    assert divergence([1, 2], 8) == 5 / 8
