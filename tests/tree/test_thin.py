"""Fewer leaves for the update: the expectation over the choice is what all leaves teach."""

from __future__ import annotations

import numpy as np
import pytest

from treepo_mega.tree.credit import Lesson
from treepo_mega.tree.node import Tree
from treepo_mega.tree.node_advantage import node_advantages
from treepo_mega.tree.segments import Floats, Segments
from treepo_mega.tree.thin import Thinned, chances, chosen, thin

STARTS = (np.arange(400) + 0.5) / 400


def forest() -> list[Tree]:
    """Two trees of six leaves in three pairs; one leaf in six is right."""
    trees = []
    for prompt in ("a", "b"):
        tree = Tree.start(prompt, [1, 2])
        for pair in range(3):
            up = tree.add_child(0)
            up.tokens, up.logprobs = [3] * (pair + 1), [-1.0] * (pair + 1)
            for length in (2, 4):
                leaf = tree.add_child(up.id)
                leaf.tokens, leaf.logprobs = [4] * length, [-1.0] * length
                tree.leaves.append(leaf.id)
        tree.rewards = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        trees.append(tree)
    return trees


def against_the_mean(trees: list[Tree]) -> list[Floats]:
    return [np.array(tree.rewards) - np.mean(tree.rewards) for tree in trees]


def masses(fewer: Thinned, per_node: bool) -> dict[tuple[str, int], float]:
    """What each node's tokens are pushed by, (prompt, node) -> net mass; seq-mean-token-sum has no denominator of its
    own that the choice could move."""
    segments = Segments.from_trees(fewer.trees, fewer.prompts)
    lesson = Lesson(segments, np.concatenate(fewer.values), per_node, "token-mean", counts=fewer.counts)
    credit = lesson.credit()
    # token-mean divides by the counted pairs; undone, for a ratio's mean is not the ratio of means.
    pairs = float((fewer.counts * segments.flat_lengths()).sum()) / segments.flat_lengths().sum()
    first = np.cumsum([0, *(len(tree.nodes) for tree in fewer.trees)])
    names = [(fewer.trees[g].prompt_id, int(n - first[g])) for g, n in zip(segments.group, segments.node, strict=True)]
    return dict(zip(names, (credit.A_pos + credit.A_neg) * pairs, strict=True))


@pytest.mark.parametrize("counts", [None, [0.1, 0.2, 0.1, 0.2, 0.2, 0.2] * 2])
@pytest.mark.parametrize("per_node", [False, True])
def test_the_mean_over_the_choice_is_what_all_leaves_teach(per_node, counts):
    trees = forest()
    values = [np.array(node_advantages(t, "rloo")) for t in trees] if per_node else against_the_mean(trees)
    whole = masses(thin(trees, [0, 1], values, counts, share=1.0, start=0.5), per_node)
    mean = dict.fromkeys(whole, 0.0)
    for start in STARTS:
        for name, mass in masses(thin(trees, [0, 1], values, counts, share=0.5, start=start), per_node).items():
            mean[name] += mass / len(STARTS)
    assert mean == pytest.approx(whole, abs=5e-3 * max(map(abs, whole.values())))


def test_the_number_of_leaves_is_the_share_and_the_rare_ones_are_all_there():
    trees = forest()
    values = against_the_mean(trees)
    for start in STARTS:
        fewer = thin(trees, [4, 9], values, None, share=0.5, start=start)
        rewards = [reward for tree in fewer.trees for reward in tree.rewards]
        assert (len(rewards), sum(rewards)) == (6, 2), "two right ones of twelve, and four of the ten others"
        assert fewer.prompts == [4, 9]
        assert sorted(fewer.counts) == pytest.approx([1, 1, 2.5, 2.5, 2.5, 2.5])


def test_a_tree_without_a_chosen_leaf_is_left_out():
    trees = forest()
    values = [np.zeros(6), np.array([1.0, -1.0, 0, 0, 0, 0])]
    fewer = thin(trees, [4, 9], values, None, share=1 / 6, start=0.3)
    assert (fewer.prompts, [tree.leaves for tree in fewer.trees]) == ([9], [trees[1].leaves[:2]])
    assert fewer.values[0].tolist() == [1.0, -1.0]


def test_a_leaf_without_advantage_stands_for_its_like_with_a_bounded_weight():
    trees = forest()
    values = [np.zeros(6), np.array([1.0, -1.0, 0, 0, 0, 0])]
    largest = max(thin(trees, [4, 9], values, None, share=0.5, start=start).counts.max() for start in STARTS)
    # Ten of them share four places with equal chances.
    assert largest == pytest.approx(2.5)


def test_without_any_advantage_all_leaves_stay():
    trees = forest()
    fewer = thin(trees, [0, 1], [np.zeros(6)] * 2, None, share=0.25, start=0.3)
    assert [tree.leaves for tree in fewer.trees] == [tree.leaves for tree in trees]
    assert fewer.counts.tolist() == [1.0] * 12


def test_every_leaf_is_chosen_as_often_as_its_chance_says():
    size = np.random.default_rng(0).exponential(size=40)
    chance = chances(size, 13.0)
    assert chance.sum() == pytest.approx(13) and chance.max() == 1 and (np.diff(chance[size.argsort()]) >= 0).all()
    often = np.mean([chosen(chance, start) for start in STARTS], axis=0)
    assert often == pytest.approx(chance, abs=1 / len(STARTS))
    assert {int(chosen(chance, start).sum()) for start in STARTS} <= {12, 13, 14}
