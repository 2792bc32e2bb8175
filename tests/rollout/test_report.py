"""What engines tell all ranks: every value of a row comes back as it was, and trees without their contents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from treepo_mega.config import load_config
from treepo_mega.rollout.report import ReportError, complete, heard, lend_contents, told
from treepo_mega.runtime.packed import pack, unpack
from treepo_mega.tree.diversity import effective_samples
from treepo_mega.tree.node import Tree

GRADES = st.lists(st.none() | st.floats(allow_nan=False), max_size=3)
COLUMNS = (st.booleans(), st.integers(-(2**40), 2**40), st.integers(0, 9), st.floats(allow_nan=False), GRADES)
VALUES = (*COLUMNS, st.dictionaries(st.text("ab/", max_size=2), st.lists(st.integers(0, 3), max_size=2), max_size=2))


def jobs_of(names: list[str]) -> Any:
    return [SimpleNamespace(prompt=SimpleNamespace(id=name)) for name in names]


@examples(60)
@given(st.data())
def test_rows_come_back_as_they_were(data: Any) -> None:
    count = data.draw(st.integers(0, 20))
    kinds = data.draw(st.lists(st.sampled_from([*VALUES, st.one_of(*VALUES)]), max_size=4))
    rows = {
        3 * index: {f"key {number}": data.draw(kind) for number, kind in enumerate(kinds)} for index in range(count)
    }
    got = heard(unpack(pack(told(rows))), [], home=None)
    assert repr(got) == repr(rows)


@examples(30)
@given(forests())
def test_trees_come_with_what_needs_contents(trees: list[Tree]) -> None:
    cfg = load_config(None, ["model.hf_checkpoint=x", "data.train=[{path: x}]", "train.prefix_sharing=content"])
    for tree in trees:
        complete(tree, cfg, home=3)
    rows = {index: {"tree": tree, "lost": 0} for index, tree in enumerate(trees)}
    got = heard(unpack(pack(told(rows))), jobs_of([tree.prompt_id for tree in trees]), home=3)
    for index, tree in enumerate(trees):
        far = got[index]["tree"]
        assert (far.home, far.counts, far.rewards, far.leaves) == (3, tree.counts, tree.rewards, tree.leaves)
        assert far.counts["effective"] == effective_samples(tree) and far.alike is not None
        lend_contents(far, tree)
        assert far == tree


def test_ranks_of_an_engine_that_sampled_unlike_are_named() -> None:
    near = Tree.start("p4", [1, 2])
    near.add_child(0).tokens = [5]
    (far,) = (row["tree"] for row in heard(told({0: {"tree": near}}), jobs_of(["p4"]), home=0).values())
    near.nodes[1].tokens = [5, 6]
    with pytest.raises(ReportError, match=r"'p4', node 1: the first rank of the engine has 1 tokens at \(0,\), and"):
        lend_contents(far, near)
