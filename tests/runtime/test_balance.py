"""Dealing: everything once, near even, under the cap, the same for everyone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.runtime.balance import balance, deal, fill


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 5))
def test_balance_deals_all_and_stays_near_even(costs, bins):
    dealt = balance(costs, bins)
    assert sorted(i for b in dealt for i in b) == list(range(len(costs)))
    loads = [sum(costs[i] for i in b) for b in dealt]
    # Longest-first greedy: the gap is at most one item, since the last one went to the emptiest bin.
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert dealt == balance(costs, bins)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_fill_keeps_the_cap_and_wastes_little(sizes, cap):
    bins = fill(sizes, cap)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    loads = sorted(sum(sizes[i] for i in b) for b in bins)
    assert all(0 < x <= cap for x in loads)
    assert all(a + b > cap for a, b in itertools.pairwise(loads)), "no two neighbours could be one"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120), st.integers(0, 3))
def test_deal_keeps_the_cap_with_any_number_of_bins_that_suffices(sizes, cap, more):
    count = len(fill(sizes, cap)) + more
    dealt = deal(sizes, cap, count)
    assert len(dealt) == count
    assert sorted(i for b in dealt for i in b) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in b) <= cap for b in dealt)


def test_an_item_above_the_cap_is_an_error():
    with pytest.raises(ValueError, match="an item of 9 does not fit a bin of 8"):
        fill([1, 9], 8)
