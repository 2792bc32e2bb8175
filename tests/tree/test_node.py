"""The tree container: prefixes, counts of shared tokens, depth-first order, serialisation."""

from __future__ import annotations

import json

import pytest

from treepo_mega.tree.node import ROOT, Tree


def example() -> Tree:
    tree = Tree.start("p", [1, 2])
    a = tree.add_child(ROOT)
    a.tokens, a.logprobs = [3, 4], [-0.1, -0.2]
    b = tree.add_child(ROOT)
    b.tokens, b.logprobs, b.stop = [5], [-0.3], "eos"
    c = tree.add_child(a.id)
    c.tokens, c.logprobs, c.stop = [6], [-0.4], "answer"
    d = tree.add_child(a.id, fallback=True, policy_version=3)
    d.tokens, d.logprobs, d.stop = [7, 8], [-0.5, -0.6], "length"
    tree.leaves = [b.id, c.id, d.id]
    return tree


def test_paths_and_prefixes():
    tree = example()
    assert [n.path for n in tree.nodes] == [(), (0,), (1,), (0, 0), (0, 1)]
    assert [n.depth for n in tree.nodes] == [0, 1, 1, 2, 2]
    assert tree.ancestry(4) == [0, 1, 4]
    assert tree.prefix(4) == [1, 2, 3, 4, 7, 8]
    assert tree.response(4) == [3, 4, 7, 8]
    assert tree.prompt_tokens == [1, 2]


def test_shared_tokens_count_once_in_unique_and_once_a_leaf_in_flat():
    tree = example()
    assert tree.unique_tokens() == 2 + 1 + 1 + 2
    assert tree.flat_tokens() == 1 + 3 + 4
    unused = tree.add_child(2)
    unused.tokens = [9]
    assert tree.unique_tokens() == 6, "a node on no trajectory is not counted"


def test_json_round_trip():
    tree = example()
    tree.rewards, tree.shortfall, tree.counts = [0.0, 1.0, 0.5], "why", {"segments": 4}
    again = Tree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert again == tree


def test_renumbering_forgets_the_order_of_creation():
    def build(order):
        tree = Tree.start("p", [1])
        for _ in range(2):
            tree.add_child(0)
        for parent in order:
            tree.add_child(tree.nodes[0].children[parent]).stop = "eos"
        tree.leaves = [n.id for n in tree.nodes if n.stop]
        tree.renumber()
        return tree

    one = build([0, 1, 1])
    assert one == build([1, 0, 1]) == build([1, 1, 0])
    assert [n.path for n in one.nodes] == [(), (0,), (1,), (0, 0), (1, 0), (1, 1)] and one.leaves == [3, 4, 5]
    one.rewards = [0.0] * 3
    with pytest.raises(ValueError, match="graded"):
        one.renumber()
