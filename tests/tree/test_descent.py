"""Weighed by their descent, leaves are fair samples of the policy: mean reward and gradient of an enumerable process.

The process and its exact gradient are the bench's (tools/bench/estimators.py), with fewer trees.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given

from tests.tree.test_advantage import trees
from treepo_mega.config import RolloutConfig
from treepo_mega.tree.descent import descent_shares, fair_leaves, leaf_shares, policy_mean
from treepo_mega.tree.node import Tree

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "estimators.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimators_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@given(trees())
def test_shares_are_the_chances_of_a_random_walk(tree: Tree) -> None:
    shares = descent_shares(tree)
    assert sum(shares) == pytest.approx(1)
    below = tree.leaves_below()
    for leaf, share in zip(tree.leaves, shares, strict=True):
        chance = 1.0
        for node in tree.ancestry(leaf)[1:]:
            siblings = [child for child in tree.nodes[tree.nodes[node].parent].children if child in below]
            chance *= 1 / len(siblings)
        # An inner node may itself be a leaf of these random trees only if its children lost theirs.
        assert share == pytest.approx(chance)
    assert leaf_shares(tree, "uniform") is None


def test_fallback_leaves_count_nothing() -> None:
    tree = Tree.start("p", [1])
    first = tree.add_child(0)
    begun = tree.add_child(0, fallback=True)
    tree.leaves = [first.id, tree.add_child(begun.id).id]
    tree.rewards = [1.0, 0.0]
    assert fair_leaves(tree).leaves == [first.id]
    assert policy_mean([tree], lambda tree, index: tree.rewards[index]) == 1.0
    # A tree without a fair leaf says nothing of the policy; it must not count as 0.
    tree.leaves = tree.leaves[1:]
    tree.rewards = [0.0]
    assert policy_mean([tree], lambda tree, index: tree.rewards[index]) == 0.0
    other = Tree.start("q", [1])
    other.leaves = [other.add_child(0).id]
    other.rewards = [1.0]
    assert policy_mean([tree, other], lambda tree, index: tree.rewards[index]) == 1.0


@pytest.mark.parametrize(
    "sampler, seen",
    [
        ("level, fallback", -0.1),
        ("quota, fallback", -0.1),
        ("fork, threshold", -0.02),
        ("fork, threshold, other", -0.02),
    ],
)
def test_gradient_and_mean_reward_are_those_of_the_policy(bench: ModuleType, sampler: str, seen: float) -> None:
    process = bench.Process(stops=True, binary=True, seed=3)
    rollout = RolloutConfig().replace({"segment.length": 1, "n_samples_per_prompt": 16, "max_response_len": 5})
    rng = random.Random(5)
    grown = [process.grow(rollout.replace(bench.SAMPLERS[sampler]), rng) for _ in range(250)]
    fair = bench.judge(process, grown, "rloo", "descent")
    leaves = bench.judge(process, grown, "rloo", "uniform")
    assert fair["cos"] > 0.985 > leaves["cos"]
    assert abs(fair["mean_reward_bias"]) < 3 * fair["standard_error"]
    assert leaves["mean_reward_bias"] < seen, "the test can see the bias of leaves that count alike"
    assert policy_mean(grown, lambda tree, index: tree.rewards[index]) - process.expected_reward == pytest.approx(
        fair["mean_reward_bias"]
    )


def test_an_unknown_weight_is_named() -> None:
    with pytest.raises(ValueError, match="'p_i': expected one of uniform, descent"):
        leaf_shares(Tree.start("p", [1]), "p_i")
