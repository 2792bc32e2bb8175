"""Attention pairs of sampling, counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from treepo_mega.engine.stream import Finished
from treepo_mega.rollout.counts import TokenCounts


def finished(tokens: int, *, cached: int = 0, peek: bool = False, more: bool = False) -> Finished:
    return Finished(
        "name", list(range(tokens)), [0.0] * tokens, "length", cached, peek=[-1.0] if peek else [], more=more
    )  # fmt: skip


def pairs_seen(cached: int, forwarded: int) -> int:
    """Every forwarded token sees itself and all before it."""
    return sum(position + 1 for position in range(cached, cached + forwarded))


@pytest.mark.parametrize("cached", [0, 3])
@pytest.mark.parametrize("peek", [False, True])
def test_pairs_of_one_request(cached, peek):
    counts = TokenCounts(Counter())
    segment = finished(4, cached=cached, peek=peek)
    counts.add_prefix(5, segment)
    counts.add_forwarded(5, segment)
    # 5 of the prefix and 4 sampled ones; the last of all that were sampled never goes through the model.
    forwarded = 5 + 4 - cached - (not peek)
    assert counts.counts["forwarded_tokens"] == forwarded
    assert counts.counts["forwarded_pairs"] == pairs_seen(cached, forwarded)


def test_segments_of_a_run_cost_what_the_run_costs_at_once():
    whole, parts = TokenCounts(Counter()), TokenCounts(Counter())
    whole.add_prefix(5, finished(6))
    whole.add_forwarded(5, finished(6))
    parts.add_prefix(5, finished(4, more=True))
    parts.add_forwarded(5, finished(4, more=True))
    parts.add_forwarded(9, finished(2))
    assert whole.counts == parts.counts
    assert parts.counts["forwarded_pairs"] == pairs_seen(0, parts.counts["forwarded_tokens"])
