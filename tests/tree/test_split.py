"""Cutting large trees: pieces fit, cover every leaf, and repeat as little as any cut could."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import contexts, forests
from treepo_mega.config import ConfigError
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.split import cut, pieces


def held(paths):
    """Tokens of some contexts, those that they have in common once: no two tokens of a forest have one id."""
    return len({token for path in paths for token in path})


def ends_of(s):
    """The context of every end of the forest, in depth-first order."""
    out = []
    for segment in s.leaf_segment.tolist():
        path = []
        while segment >= 0:
            path = [*s.tokens[s.source[segment] : s.source[segment] + s.length[segment]].tolist(), *path]
            segment = int(s.parent[segment])
        out.append(path)
    return out


@examples(100)
@given(forests(max_trees=3, max_nodes=9), st.integers(0, 25))
def test_no_cut_repeats_less(trees, extra):
    s = Segments.from_trees(trees, range(len(trees)))
    ends = ends_of(s)
    every = {tuple(c) for t in trees for leaf in t.leaves for c in contexts(t, leaf)}
    assert {tuple(end) for end in ends} <= every
    assert all(any(tuple(end[: len(c)]) == c for end in ends) for c in every), "each context is one, or a part of one"
    most = max(map(len, ends)) + extra
    got = pieces(s, most).tolist()
    assert [(lo, hi) for _, lo, hi in got] == list(itertools.pairwise([lo for _, lo, _ in got] + [got[-1][2]]))
    for g in range(len(trees)):
        mine = [(lo, hi) for k, lo, hi in got if k == g]
        order = ends[mine[0][0] : mine[-1][1]]
        sizes = [held(ends[lo:hi]) for lo, hi in mine]
        assert max(sizes) <= most
        # There are 2 to the power of ends ways to cut.
        assume(len(order) <= 12)
        best = min(
            sum(parts)
            for k in range(len(order))
            for borders in itertools.combinations(range(1, len(order)), k)
            if max(parts := [held(order[a:b]) for a, b in itertools.pairwise([0, *borders, len(order)])]) <= most
        )
        assert sum(sizes) == best
    assert got[-1][2] == len(ends)


def test_cuts_fall_where_little_is_shared():
    # Leaves 0, 1 share 8 of 10 tokens, 1, 2 share 2, 2, 3 share 8: the cheap border is the middle one.
    assert cut([10, 10, 10, 10], [10, 2, 8, 2], 12) == [0, 2, 4]
    assert cut([10, 10, 10, 10], [10, 2, 8, 2], 22) == [0, 4]
    assert cut([10, 10, 10], [10, 0, 0], 10) == [0, 3], "leaves that bring nothing cost nothing"


def test_a_path_that_does_not_fit_is_named_by_its_length():
    from treepo_mega.tree.pack import Trajectory

    s = Segments.from_paths([Trajectory(0, [1] * 9, 1, 0.0, [0.0] * 8)])
    with pytest.raises(ConfigError, match=r"a trajectory of 9 tokens does not fit train\.max_tokens_per_gpu=8"):
        pieces(s, 8)
