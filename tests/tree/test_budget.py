"""The branching budget: bounds, fairness, and the published numbers of a binary tree."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.tree.budget import level_budget, split_equally


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
