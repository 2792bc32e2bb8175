"""Masses, weights and where credit falls, by their definitions; and the clipped loss on masses, regime by regime."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from treepo_mega.config import AlgoConfig
from treepo_mega.loss.policy import clipped_objective
from treepo_mega.tree.advantage import leaf_advantages
from treepo_mega.tree.credit import Aggregation, credit_by_depth, fold, fold_nodes, leaf_weights
from treepo_mega.tree.node import Tree
from treepo_mega.tree.node_advantage import node_advantages
from treepo_mega.tree.segments import Segments


@examples(100)
@given(forests(), st.data())
def test_fold_is_masses_per_node(trees, data):
    """Per node: the sums of the positive and of the negative advantages of the leaves below it, and their number."""
    per_tree = [[data.draw(st.floats(-3, 3)) for _ in t.leaves] for t in trees]
    s = Segments.from_trees(trees, range(len(trees)))
    c = fold(s, np.concatenate(per_tree), np.ones(s.leaf_count))
    base, want = 0, {}
    for t, a in zip(trees, per_tree, strict=True):
        for i, leaf in enumerate(t.leaves):
            for node in t.ancestry(leaf):
                pos, neg, count = want.get(base + node, (0.0, 0.0, 0))
                want[base + node] = (pos + max(a[i], 0), neg + min(a[i], 0), count + 1)
        base += len(t.nodes)
    assert sorted(set(s.node.tolist())) == sorted(want), "nodes without a leaf are left out"
    for i, node in enumerate(s.node.tolist()):
        got = (c.A_pos[i], c.A_neg[i], c.count[i])
        assert got == pytest.approx(want[node], rel=1e-12, abs=1e-12)
        assert c.n[i] == c.count[i]


def test_reinforce_is_the_reward():
    tree = Tree.start("p", [1])
    for r in (1.0, 0.0):
        tree.leaves.append(tree.add_child(0).id)
        tree.rewards.append(r)
    assert leaf_advantages(tree, "reinforce_pp") == [1.0, 0.0]


@pytest.mark.parametrize(
    "mode, want",
    [
        ("token-mean", [1, 1, 1]),
        ("seq-mean-token-mean", [12 / (2 * 4), 12 / (2 * 8), 12 / 2]),
        ("seq-mean-token-sum", [6, 6, 6]),
        ("seq-mean-token-sum-norm", [0.5, 0.5, 0.5]),
    ],
)
def test_weights(mode, want):
    """P = 12 pairs of N = 2 trajectories that have tokens; a response has at most 12."""
    assert leaf_weights(mode, np.array([4, 8, 0]), max_response_len=12).tolist() == want


@pytest.mark.parametrize("mode", get_args(Aggregation))
@given(st.data())
def test_a_count_is_how_often_the_trajectory_counts(mode, data):
    """The loss with counts equals that of a batch that holds trajectory i so often, whatever unit counts have."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(lengths), max_size=len(lengths)))
    losses = data.draw(st.lists(st.floats(-2, 2), min_size=len(lengths), max_size=len(lengths)))
    repeat = [i for i, count in enumerate(counts) for _ in range(count)]

    def loss(which, weights):
        """Sum over rows divided by pairs; each trajectory has one loss a token."""
        rows = sum(weights[at] * losses[i] * lengths[i] for at, i in enumerate(which))
        return rows / sum(lengths[i] for i in which)

    unit = data.draw(st.floats(0.1, 10))
    weighted = leaf_weights(mode, np.array(lengths), counts=np.array(counts) * unit, max_response_len=9)
    repeated = leaf_weights(mode, np.array([lengths[i] for i in repeat]), max_response_len=9)
    assert loss(range(len(lengths)), weighted) == pytest.approx(loss(repeat, repeated), rel=1e-9, abs=1e-9)


def tree_of_two():
    """A shared half (4 tokens) and two own halves of opposite outcome."""
    tree = Tree.start("p", [0])
    for parent in (0, 1, 1):
        node = tree.add_child(parent)
        node.tokens, node.logprobs = [1] * 4, [-1.0] * 4
    tree.leaves, tree.rewards = [2, 3], [1.0, 0.0]
    return tree


def test_credit_falls_behind_the_branch():
    s = Segments.from_trees([tree_of_two()], [0])
    ones = np.ones(2)
    assert credit_by_depth(s, fold(s, np.array([1.0, -1.0]), ones)) == [0, 0, 0.5, 0.5], "shared: +1 and -1 cancel"
    assert credit_by_depth(s, fold(s, np.array([1.0, 1.0]), ones)) == [0.25] * 4
    flat = Segments.from_trees([tree_of_two()], [0], "none")
    assert credit_by_depth(flat, fold(flat, np.array([1.0, -1.0]), ones)) == [0.25] * 4, "flat: every token alike"
    assert credit_by_depth(s, fold_nodes(s, np.array(node_advantages(tree_of_two(), "segment")), ones)) == [
        0,
        0,
        0.5,
        0.5,
    ]
    assert credit_by_depth(s, fold(s, np.zeros(2), ones)) == [0] * 4


LOW, HIGH, DUAL = 0.2, 0.28, 3.0
RATIOS = {
    "clipped low": (0.5,),
    "at the lower border": (1 - LOW,),
    "inside": (0.9, 1.0, 1.2),
    "at the upper border": (1 + HIGH,),
    "clipped high": (2.0,),
    "at the dual border": (DUAL,),
    "dual": (7.0,),
}


@pytest.mark.parametrize("dual", [None, DUAL])
@pytest.mark.parametrize("signs", ["positive", "negative", "both"])
@pytest.mark.parametrize("regime", RATIOS)
def test_the_clipped_loss_is_a_function_of_the_masses(regime, signs, dual):
    """Value and slope for a token of four trajectories against its four PPO terms, in every regime of the clip."""
    tree = Tree.start("p", [0])
    stem = tree.add_child(0)
    stem.tokens, stem.logprobs = [1], [0.0]
    tree.leaves = [tree.add_child(stem.id).id for _ in range(4)]
    tree.rewards = [0.0] * 4
    each = {"positive": [1.5, 0.5, 0.0, 2.0], "negative": [-1.0, -0.25, 0.0, -3.0], "both": [2.0, -1.0, 0.5, -0.75]}
    a = np.array(each[signs])
    s = Segments.from_trees([tree], [0])
    c = fold(s, a, np.ones(4))
    shared = s.node.tolist().index(stem.id)
    algo = AlgoConfig(eps_clip=LOW, eps_clip_high=HIGH, eps_clip_c=dual)
    masses_of = [torch.tensor([x[shared]], dtype=torch.float64) for x in (c.A_pos, c.A_neg)]

    def term(r, x):
        value = torch.minimum(r * x, r.clamp(1 - LOW, 1 + HIGH) * x)
        return torch.maximum(value, torch.tensor(dual * x)) if x < 0 and dual is not None else value

    for ratio in RATIOS[regime]:
        r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
        got, want = clipped_objective(r, *masses_of, algo).sum(), sum(term(r, x) for x in a.tolist()).sum()
        assert got.item() == pytest.approx(want.item(), rel=1e-14)
        if "border" not in regime:  # where either one-sided slope is right
            slopes = [torch.autograd.grad(x, r)[0].item() for x in (got, want)]
            assert slopes[0] == pytest.approx(slopes[1], rel=1e-14)
            flat = {"clipped low": signs == "negative", "clipped high": signs == "positive"}
            flat["dual"] = signs == "positive" or dual is not None
            assert (slopes[0] == 0) == flat.get(regime, False), "clipped tokens, and no others, have no gradient"
