"""Advantages equal what the published code returned for 18 trees (numbers only), to 1e-9 in fp64.

The published code skips a subgroup when `torch.std(rewards) == 0`. The std of equal rewards that are inexact in
binary, such as three times 0.1, is 1.7e-17, so it keeps a group that eq. 7 drops. No group of these trees is such a
case: both rules agree on them. `test_equal_inexact_rewards_are_rejected` shows the case itself.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from treepo_mega.tree.advantage import leaf_advantages, whiten
from treepo_mega.tree.node import Tree

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "treepo_advantages.json").read_text(encoding="utf-8"))
ESTIMATORS = {"average": "treepo", "group_size": "treepo_size_weighted"}


def tree_of(case: dict[str, Any]) -> Tree:
    """The tree of a golden case: parents by node, tokens a node, leaves and rewards."""
    tree = Tree.start("golden", [0])
    for parent, size in itertools.islice(zip(case["parent"], case["tokens"], strict=True), 1, None):
        node = tree.add_child(parent)
        node.tokens = [1] * size
    tree.leaves = list(case["leaves"])
    tree.rewards = list(case["rewards"])
    return tree


@pytest.mark.parametrize("index", range(len(GOLDEN)))
@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize("official", ESTIMATORS)
def test_the_published_values(index: int, official: str, reject: bool) -> None:
    case = GOLDEN[index]
    tree = tree_of(case)
    raw = leaf_advantages(tree, ESTIMATORS[official], reject_zero_std_subgroups=reject)
    assert raw == pytest.approx(case[f"{official}|{reject}|raw"], abs=1e-9)
    white = whiten(raw, [len(tree.response(leaf)) for leaf in tree.leaves])
    assert white == pytest.approx(case[f"{official}|{reject}|whitened"], abs=1e-9)


def test_equal_inexact_rewards_are_rejected() -> None:
    tree = Tree.start("p", [0])
    parent = tree.add_child(0).id
    tree.leaves = [*(tree.add_child(parent).id for _ in range(3)), tree.add_child(0).id]
    tree.rewards = [0.1, 0.1, 0.1, 1.0]
    mean = 1.3 / 4
    got = leaf_advantages(tree, "treepo", reject_zero_std_subgroups=True)
    assert got == pytest.approx([0.1 - mean] * 3 + [1.0 - mean], abs=1e-12), "the root group alone is left"
