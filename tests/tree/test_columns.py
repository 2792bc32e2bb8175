"""Trees as columns: everything but contents comes back, and reading contents that are elsewhere fails."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from tests.tree.parts import sent
from treepo_mega.tree.columns import ColumnsError, to_columns
from treepo_mega.tree.elsewhere import Elsewhere, TokensElsewhere
from treepo_mega.tree.merge import compare
from treepo_mega.tree.node import Tree


def outline(tree: Tree) -> dict:
    """A tree without its contents."""
    entries = tree.to_dict()
    for node in entries["nodes"]:
        for name in ("tokens", "logprobs", "entropies", "peek"):
            node[name] = len(node[name]) if name == "tokens" else None
    return entries


@examples(60)
@given(forests(), st.data())
def test_all_but_contents_comes_back(trees, data):
    for tree in trees:
        for node in tree.nodes:
            node.stop = data.draw(st.sampled_from([None, "eos", "length"]))
            node.fallback = data.draw(st.booleans())
            node.fork = data.draw(st.sampled_from([None, "rank", "threshold"]))
            node.policy_version = data.draw(st.sampled_from([0, 3, 1 << 20]))
            node.level = data.draw(st.integers(0, 300))
            node.weight = data.draw(st.sampled_from([1.0, 1.0, 2.0, 0.1]))
        tree.counts = data.draw(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e9), max_size=3))
        tree.shortfall = data.draw(st.sampled_from([None, "1 of 4 rewards lost"]))
        tree.verdicts = data.draw(st.sampled_from([[], list(tree.rewards)]))
        tree.alike = compare(tree)
    for there, here in zip(sent(trees), trees, strict=True):
        assert outline(there) == outline(here)
        assert there.alike is not None and here.alike is not None
        for name in ("atoms", "length", "name"):
            assert getattr(there.alike, name).tolist() == getattr(here.alike, name).tolist()
        assert there.flat_tokens() == here.flat_tokens() and there.unique_tokens() == here.unique_tokens()


def test_contents_that_are_elsewhere_are_never_taken_for_nothing():
    tree = Tree.start("p", [1, 2, 3])
    node = tree.add_child(0)
    node.tokens, node.logprobs, tree.leaves = [4, 5], [-0.5, -0.25], [1]
    (there,) = sent([tree])
    assert (len(there.nodes[1].tokens), there.response_length(1), there.nodes[1].tokens) == (2, 2, Elsewhere(2))
    for read in (lambda: there.response(1), lambda: there.nodes[1].logprobs[0], lambda: there.prefix(1)):
        with pytest.raises(TokensElsewhere, match=r"these [23] tokens are on the rank whose engine"):
            read()
    with pytest.raises(TypeError, match="Elsewhere is not JSON serializable"):
        json.dumps(there.to_dict())


def test_children_that_paths_do_not_order_are_named():
    tree = Tree.start("p7", [1])
    tree.add_child(0)
    tree.add_child(0)
    tree.nodes[0].children.reverse()
    with pytest.raises(ColumnsError, match=r"'p7', node 0: it has the children \[2, 1\], .* are \[1, 2\]"):
        to_columns([tree])
