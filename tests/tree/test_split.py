"""Cutting large trees: pieces fit, cover every leaf, and repeat as little as any cut could."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from treepo_mega.config import ConfigError
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.split import cut, pieces


def held(tree, leaves):
    """Tokens of the given leaves and their ancestors, each once."""
    nodes = {n for leaf in leaves for n in tree.ancestry(leaf)}
    return sum(len(tree.nodes[n].tokens) for n in nodes)


def depth_first(tree):
    """Leaves in pre-order."""
    rank = {n.id: i for i, n in enumerate(sorted(tree.nodes, key=lambda n: n.path))}
    return sorted(tree.leaves, key=rank.__getitem__)


@examples(100)
@given(forests(max_trees=3, max_nodes=9), st.integers(0, 25))
def test_no_cut_repeats_less(trees, extra):
    s = Segments.from_trees(trees, range(len(trees)))
    most = max(len(t.prefix(leaf)) for t in trees for leaf in t.leaves) + extra
    got = pieces(s, most).tolist()
    assert [(lo, hi) for _, lo, hi in got] == list(itertools.pairwise([lo for _, lo, _ in got] + [got[-1][2]]))
    base = 0
    for g, tree in enumerate(trees):
        order = depth_first(tree)
        mine = [(lo - base, hi - base) for k, lo, hi in got if k == g]
        sizes = [held(tree, order[a:b]) for a, b in mine]
        assert max(sizes) <= most
        best = min(
            sum(parts)
            for k in range(len(order))
            for borders in itertools.combinations(range(1, len(order)), k)
            if max(parts := [held(tree, order[a:b]) for a, b in itertools.pairwise([0, *borders, len(order)])]) <= most
        )
        assert sum(sizes) == best
        base += len(order)
    assert base == got[-1][2]


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
