"""Advantages of nodes: segments reach from branch to branch; leave-one-out leaves out what shares the token."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given

from tests.tree.test_advantage import trees, two_by_two
from treepo_mega.tree.node import Tree
from treepo_mega.tree.node_advantage import NODE_ESTIMATORS, node_advantages


def test_worked_vectors() -> None:
    tree = two_by_two([1.0, -1.0, -1.0, -1.0])
    # Nodes: root, left, right, then the leaves A, B, C, D.
    assert node_advantages(tree, "segment") == [0.0, 0.5, -0.5, 1.0, -1.0, 0.0, 0.0]
    assert node_advantages(tree, "rloo") == pytest.approx([0.0, 1.0, -1.0, 2.0, -2 / 3, -2 / 3, -2 / 3])


@given(trees())
def test_a_chain_has_the_advantage_of_its_first_node(tree: Tree) -> None:
    below = tree.leaves_below()
    values = node_advantages(tree, "segment")
    for node in tree.nodes[1:]:
        if node.id not in below:
            assert values[node.id] == 0.0
            continue
        siblings = [child for child in tree.nodes[node.parent].children if child in below]
        if len(siblings) == 1 and node.parent != 0:
            assert values[node.id] == values[node.parent]
        else:
            own = statistics.fmean(tree.rewards[i] for i in below[node.id])
            parent = statistics.fmean(tree.rewards[i] for i in below[node.parent])
            assert values[node.id] == pytest.approx(own - parent, abs=1e-12)


@given(trees())
def test_segments_on_a_path_add_up_to_its_outcome(tree: Tree) -> None:
    """Each segment counts once, however many nodes its chain has."""
    below = tree.leaves_below()
    values = node_advantages(tree, "segment")
    for leaf, reward in zip(tree.leaves, tree.rewards, strict=True):
        tops = [
            node
            for node in tree.ancestry(leaf)[1:]
            if tree.nodes[node].parent == 0
            or sum(child in below for child in tree.nodes[tree.nodes[node].parent].children) > 1
        ]
        assert sum(values[node] for node in tops) == pytest.approx(reward - statistics.fmean(tree.rewards), abs=1e-12)


@given(trees())
def test_rloo_compares_with_the_leaves_that_do_not_share_the_node(tree: Tree) -> None:
    below = tree.leaves_below()
    values = node_advantages(tree, "rloo")
    for node in tree.nodes[1:]:
        inside = below.get(node.id, [])
        outside = [reward for index, reward in enumerate(tree.rewards) if index not in inside]
        want = (
            statistics.fmean(tree.rewards[i] for i in inside) - statistics.fmean(outside) if inside and outside else 0
        )
        assert values[node.id] == pytest.approx(want, abs=1e-12)


@given(trees())
def test_equal_shares_are_no_shares_and_sqrt_n_divides(tree: Tree) -> None:
    shares = [1.0 / len(tree.leaves)] * len(tree.leaves)
    below = tree.leaves_below()
    for estimator in NODE_ESTIMATORS:
        plain = node_advantages(tree, estimator)
        assert node_advantages(tree, estimator, shares=shares) == pytest.approx(plain, abs=1e-12)
        scaled = [value / max(1, len(below.get(node, ()))) ** 0.5 for node, value in enumerate(plain)]
        assert node_advantages(tree, estimator, sqrt_n=True) == pytest.approx(scaled, abs=1e-12)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="'treepo': expected one of segment, rloo"):
        node_advantages(two_by_two([0.0] * 4), "treepo")
