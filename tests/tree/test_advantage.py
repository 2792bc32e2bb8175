"""Credit against brute force: the reference's test vector, flat recomputation, repeated tokens, invariances."""

from __future__ import annotations

import math
import random
import statistics
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.tree.advantage import has_signal, leaf_advantages, set_rewards, whiten
from treepo_mega.tree.credit import fold
from treepo_mega.tree.node import Tree
from treepo_mega.tree.segments import Segments


class Mass(NamedTuple):
    """What the leaves below a node add up to, and their number."""

    A_pos: float
    A_neg: float
    n: float


def masses(tree: Tree, advantages: list[float]) -> dict[int, Mass]:
    """Node id -> what `credit.fold` gives the node's segment at weight 1; nodes without a leaf below are absent."""
    segments = Segments.from_trees([tree], [0])
    credit = fold(segments, np.array(advantages), np.ones(len(advantages)))
    of_nodes = zip(credit.A_pos.tolist(), credit.A_neg.tolist(), credit.n.tolist(), strict=True)
    assert credit.n.tolist() == credit.count.tolist()
    return {node: Mass(*of) for node, of in zip(segments.node.tolist(), of_nodes, strict=True)}


def two_by_two(rewards: list[float]) -> Tree:
    """Leaves A, B under one node and C, D under another."""
    tree = Tree.start("p", [1])
    left, right = tree.add_child(0), tree.add_child(0)
    tree.leaves = [tree.add_child(n.id).id for n in (left, left, right, right)]
    tree.rewards = rewards
    return tree


@st.composite
def trees(draw: st.DrawFn, min_leaves: int = 1) -> Tree:
    """A random tree with tokens; leaves of any depth, some rewards perhaps lost (inner nodes without leaves)."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    tree = Tree.start("p", [0])
    for _ in range(draw(st.integers(min_leaves, 24))):
        node = tree.add_child(rng.randrange(len(tree.nodes)))
        node.tokens = [rng.randrange(100) for _ in range(rng.randrange(0, 5))]
        node.logprobs = [-1.0] * len(node.tokens)
    ends = [n.id for n in tree.nodes[1:] if not n.children]
    rng.shuffle(ends)
    tree.leaves = ends[: max(1, len(ends) - draw(st.integers(0, 2)))]
    tree.rewards = [rng.choice([-1.0, 0.0, 0.5, 1.0]) for _ in tree.leaves]
    return tree


def brute_force(tree: Tree, *, size_weighted: bool, reject: bool) -> list[float]:
    """The published rule on path keys, one leaf at a time: nothing shared with the code under test."""
    keys = [tree.nodes[leaf].path for leaf in tree.leaves]
    out = []
    for key, reward in zip(keys, tree.rewards, strict=True):
        terms = []
        for depth in range(len(key) + 1):
            group = [r for k, r in zip(keys, tree.rewards, strict=True) if k[:depth] == key[:depth]]
            if depth > 0 and (len(group) == 1 or (reject and statistics.pstdev(group) == 0)):
                continue
            terms.append((reward - sum(group) / len(group), len(group) if size_weighted else 1))
        out.append(sum(a * w for a, w in terms) / sum(w for _, w in terms))
    return out


@pytest.mark.parametrize(
    "estimator, reject, expected",
    [
        ("treepo", False, [1.25, -0.75, -0.25, -0.25]),
        ("treepo_size_weighted", False, [4 / 3, -2 / 3, -1 / 3, -1 / 3]),
        ("treepo", True, [1.25, -0.75, -0.5, -0.5]),
        ("reinforce_pp_baseline", False, [1.5, -0.5, -0.5, -0.5]),
        ("grpo", False, [1.5 / (1 + 1e-6), -0.5 / (1 + 1e-6), -0.5 / (1 + 1e-6), -0.5 / (1 + 1e-6)]),
    ],
)
def test_worked_vectors(estimator: str, reject: bool, expected: list[float]) -> None:
    tree = two_by_two([1.0, -1.0, -1.0, -1.0])
    got = leaf_advantages(tree, estimator, reject_zero_std_subgroups=reject)
    assert got == pytest.approx(expected, abs=1e-12)


@given(trees(), st.booleans(), st.booleans())
def test_treepo_equals_brute_force(tree: Tree, size_weighted: bool, reject: bool) -> None:
    name = "treepo_size_weighted" if size_weighted else "treepo"
    got = leaf_advantages(tree, name, reject_zero_std_subgroups=reject)
    assert got == pytest.approx(brute_force(tree, size_weighted=size_weighted, reject=reject), abs=1e-12)


@given(
    trees(), st.sampled_from(["treepo", "treepo_size_weighted", "grpo", "reinforce_pp_baseline"]), st.floats(-100, 100)
)
def test_a_shift_of_all_rewards_changes_nothing(tree: Tree, estimator: str, shift: float) -> None:
    before = leaf_advantages(tree, estimator)
    # Rewards on a grid of 2**-20: the shifted values are exact, so equal rewards stay equal.
    step = round(shift * 2**20) / 2**20
    tree.rewards = [r + step for r in tree.rewards]
    assert leaf_advantages(tree, estimator) == pytest.approx(before, abs=1e-9)


@given(trees(), st.sampled_from(["treepo", "treepo_size_weighted", "grpo", "reinforce_pp_baseline"]))
def test_the_order_of_leaves_changes_nothing_at_all(tree: Tree, estimator: str) -> None:
    before = dict(zip(tree.leaves, leaf_advantages(tree, estimator), strict=True))
    order = list(range(len(tree.leaves)))
    random.Random(1).shuffle(order)
    tree.leaves, tree.rewards = [tree.leaves[i] for i in order], [tree.rewards[i] for i in order]
    assert dict(zip(tree.leaves, leaf_advantages(tree, estimator), strict=True)) == before


@given(trees(), st.randoms(use_true_random=False))
def test_masses_equal_the_flat_sums_per_token(tree: Tree, rng: random.Random) -> None:
    adv = [rng.uniform(-2, 2) for _ in tree.leaves]
    mass = masses(tree, adv)
    flat_pos = math.fsum(max(a, 0) * len(tree.response(leaf)) for leaf, a in zip(tree.leaves, adv, strict=True))
    flat_neg = math.fsum(min(a, 0) * len(tree.response(leaf)) for leaf, a in zip(tree.leaves, adv, strict=True))
    inner = {i: m for i, m in mass.items() if i != 0}
    assert sum(m.A_pos * len(tree.nodes[i].tokens) for i, m in inner.items()) == pytest.approx(flat_pos, abs=1e-9)
    assert sum(m.A_neg * len(tree.nodes[i].tokens) for i, m in inner.items()) == pytest.approx(flat_neg, abs=1e-9)
    assert sum(m.n * len(tree.nodes[i].tokens) for i, m in inner.items()) == tree.flat_tokens()
    assert sum(len(tree.nodes[i].tokens) for i in inner) == tree.unique_tokens()
    assert mass[0].n == len(tree.leaves)
    assert all(m.A_pos >= 0 >= m.A_neg and m.n >= 1 for m in mass.values())


@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 9)), min_size=1, max_size=20))
def test_whitening_equals_repeating_every_advantage_once_a_token(pairs: list[tuple[float, int]]) -> None:
    adv, lengths = [a for a, _ in pairs], [n for _, n in pairs]
    tokens = [a for a, n in pairs for _ in range(n)]
    got = whiten(adv, lengths)
    if len(tokens) < 2:
        assert got == [0.0] * len(adv)
        return
    mean = statistics.fmean(tokens)
    scale = (statistics.variance(tokens, mean) + 1e-8) ** -0.5
    assert got == pytest.approx([(a - mean) * scale for a in adv], rel=1e-6, abs=1e-6)
    assert math.fsum(a * n for a, n in zip(got, lengths, strict=True)) == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 9)), min_size=2, max_size=20))
def test_whitening_does_not_depend_on_the_order_of_ranks(pairs: list[tuple[float, int]]) -> None:
    forward = whiten([a for a, _ in pairs], [n for _, n in pairs])
    backward = whiten([a for a, _ in pairs[::-1]], [n for _, n in pairs[::-1]])
    assert forward == backward[::-1]


def test_lost_rewards_take_their_leaves_out_and_say_so() -> None:
    tree = two_by_two([])
    assert set_rewards(tree, [1.0, None, -1.0, -1.0]) == 1
    assert tree.rewards == [1.0, -1.0, -1.0]
    assert tree.shortfall == "1 of 4 rewards lost"
    # A is now alone under its node: only the root group is left to compare it with.
    assert leaf_advantages(tree, "treepo") == pytest.approx([4 / 3, -1 / 3, -1 / 3])
    mass = masses(tree, [4 / 3, -1 / 3, -1 / 3])
    assert mass[0] == pytest.approx((4 / 3, -2 / 3, 3))
    assert 4 not in mass, "the node whose reward was lost must not be trained on"


def test_a_tree_that_lost_all_its_rewards_is_empty_not_wrong() -> None:
    tree = two_by_two([])
    assert set_rewards(tree, [None] * 4) == 4
    assert not has_signal(tree)
    assert leaf_advantages(tree, "treepo") == []
    assert masses(tree, []) == {}


@pytest.mark.parametrize("rewards, expected", [([1, 1, 1, 1], False), ([0, 0, 0, 1e-9], True)])
def test_has_signal(rewards: list[float], expected: bool) -> None:
    tree = two_by_two(rewards)
    assert has_signal(tree) is expected
    if not expected:
        for estimator in ("treepo", "treepo_size_weighted", "grpo", "reinforce_pp_baseline"):
            assert leaf_advantages(tree, estimator) == [0.0] * 4


def test_bad_input_is_named() -> None:
    tree = two_by_two([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"'p': 3 rewards for 4 leaves"):
        leaf_advantages(tree, "treepo")
    tree = two_by_two([1.0, 0.0, math.nan, 0.0])
    with pytest.raises(ValueError, match=r"leaf 5: reward nan is not finite"):
        has_signal(tree)
    with pytest.raises(ValueError, match="expected one of treepo, treepo_size_weighted, grpo, reinforce_pp"):
        leaf_advantages(two_by_two([0.0] * 4), "gae")
    with pytest.raises(ValueError, match="grpo has no subgroups"):
        leaf_advantages(two_by_two([0.0] * 4), "grpo", reject_zero_std_subgroups=True)
    with pytest.raises(ValueError, match="1 shares for 4 leaves"):
        leaf_advantages(two_by_two([0.0] * 4), "grpo", shares=[1.0])
    with pytest.raises(ValueError, match="2 advantages but 1 numbers of pairs"):
        whiten([0.0, 1.0], [3])
    with pytest.raises(ValueError, match="not finite"):
        whiten([math.inf], [3])


@given(trees(), st.sampled_from(["treepo", "treepo_size_weighted", "grpo", "reinforce_pp_baseline"]))
def test_equal_shares_are_no_shares(tree: Tree, estimator: str) -> None:
    shares = [1.0 / len(tree.leaves)] * len(tree.leaves)
    assert leaf_advantages(tree, estimator, shares=shares) == pytest.approx(leaf_advantages(tree, estimator), abs=1e-9)


@given(trees(min_leaves=2), st.sampled_from(["treepo", "grpo", "reinforce_pp_baseline"]), st.integers(2, 3))
def test_a_share_is_how_often_the_leaf_counts_in_the_mean(tree: Tree, estimator: str, times: int) -> None:
    """With the first leaf counted `times` times, baselines are those of a tree that holds it so often."""
    counts = [times if index == 0 else 1 for index in range(len(tree.leaves))]
    shares = [count / sum(counts) for count in counts]
    got = leaf_advantages(tree, estimator, shares=shares, divide_by_std=False)
    below = tree.leaves_below()
    for index, leaf in enumerate(tree.leaves):
        groups = [below[node] for node in tree.ancestry(leaf) if node == 0 or len(below[node]) > 1]
        if estimator != "treepo":
            groups = groups[:1]
        repeated = [[tree.rewards[other] for other in group for _ in range(counts[other])] for group in groups]
        want = statistics.fmean(tree.rewards[index] - statistics.fmean(rewards) for rewards in repeated)
        assert got[index] == pytest.approx(want if len(tree.leaves) > 1 else 0.0, abs=1e-12)


def test_the_ablations_of_the_paper_leave_groups_out() -> None:
    tree = two_by_two([1.0, -1.0, -1.0, -1.0])
    assert leaf_advantages(tree, "treepo", max_subgroup_depth=1) == leaf_advantages(tree, "treepo")
    assert leaf_advantages(tree, "treepo", root_group=False) == [1.0, -1.0, 0.0, 0.0]
    deeper = Tree.start("p", [1])
    top = deeper.add_child(0)
    inner = deeper.add_child(top.id)
    deeper.leaves = [deeper.add_child(inner.id).id, deeper.add_child(inner.id).id, deeper.add_child(0).id]
    deeper.rewards = [1.0, 0.0, 0.0]
    root = [1 - 1 / 3, -1 / 3, -1 / 3]
    # Depth 1 and 2 hold the same two leaves: their group counts twice unless depth 2 is left out.
    assert leaf_advantages(deeper, "treepo") == pytest.approx([(root[0] + 1.0) / 3, (root[1] - 1.0) / 3, root[2]])
    capped = leaf_advantages(deeper, "treepo", max_subgroup_depth=1)
    assert capped == pytest.approx([(root[0] + 0.5) / 2, (root[1] - 0.5) / 2, root[2]])
    # Neither the root's group nor a subgroup is left for the lone leaf.
    assert leaf_advantages(deeper, "treepo", root_group=False) == pytest.approx([0.5, -0.5, 0.0])
