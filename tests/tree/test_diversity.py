"""How different the leaves of a tree are, against pairs counted one by one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.tree.diversity import (
    common_prefix,
    common_tokens,
    distinct_responses,
    effective_samples,
    independent_samples,
)
from treepo_mega.tree.node import ROOT, Tree


def tree_of(responses: list[list[int]]) -> Tree:
    """A tree in which every response is one segment."""
    tree = Tree.start("p", [1])
    for tokens in responses:
        node = tree.add_child(ROOT)
        node.tokens = list(tokens)
        tree.leaves.append(node.id)
    return tree


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8))
def test_common_tokens_are_those_of_all_pairs(responses):
    unlike = [(one, other) for one, other in combinations(responses, 2) if one != other]
    assert common_tokens(tree_of(responses)) == (sum(common_prefix(*pair) for pair in unlike), len(unlike))


def test_effective_samples_count_unlike_responses_by_their_shares():
    assert effective_samples(tree_of([[1], [1], [1], [2]])) == pytest.approx(1.6)
    assert distinct_responses(tree_of([[1], [1], [1], [2]])) == 2
    assert effective_samples(tree_of([[1]] * 16)) == 1.0
    assert effective_samples(tree_of([[token] for token in range(16)])) == 16.0
    assert effective_samples(tree_of([])) == 0.0


def test_segments_do_not_matter_only_what_was_said():
    tree = tree_of([[1, 2, 3]])
    upper = tree.add_child(ROOT)
    upper.tokens = [1, 2]
    for token in (3, 4):
        node = tree.add_child(upper.id)
        node.tokens = [token]
        tree.leaves.append(node.id)
    assert common_tokens(tree) == (4, 2) and effective_samples(tree) == pytest.approx(9 / 5)


def test_what_leaves_share_is_one_draw():
    """A full binary tree of eight leaves: 2, 4 and 8 segments; independent samples are as many as leaves everywhere."""
    tree = Tree.start("p", [1])
    level = [ROOT]
    for _ in range(3):
        level = [tree.add_child(parent).id for parent in level for _ in range(2)]
        for node in level:
            tree.nodes[node].tokens = [3] * 4
    tree.leaves = level
    # The middles of the quarters are tokens 1.5, 4.5, 7.5 and 10.5 of 12.
    assert independent_samples(tree) == pytest.approx([2, 4, 4, 8])
    assert independent_samples(tree.only([0, 1])) == pytest.approx([1, 1, 1, 2])
    assert independent_samples(tree_of([[1, 2], [3], [4, 5, 6]])) == pytest.approx([3] * 4)
    assert independent_samples(tree_of([])) == [0.0] * 4
