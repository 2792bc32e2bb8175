"""Experts that the engine noted stay with their tokens: in nodes that are cut, on disk, between ranks, and in packs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from tests.tree.parts import sent
from treepo_mega.config import RolloutConfig
from treepo_mega.journal.contents import to_record, to_tree
from treepo_mega.runtime.packed import pack, unpack
from treepo_mega.tree.credit import fold
from treepo_mega.tree.deal import deal_forest
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.pack import Batch, Pack, lay_out, own_part
from treepo_mega.tree.routing import Experts, dtype_of, unnoted
from treepo_mega.tree.search import TreeSearch
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.stop import StopRules
from treepo_mega.tree.stretches import Deliveries, Stretches, wanted
from treepo_mega.tree.wants import RoutingMissing, Segment

LAYERS = 3
TOP_K = 2


def experts_of(tokens: list[int] | np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[tokens, LAYERS, TOP_K] by the token's id, which is unique in a forest: what any engine would have chosen."""
    wide = np.asarray(tokens, np.int64)[:, None, None] * 7 + np.arange(LAYERS * TOP_K).reshape(1, LAYERS, TOP_K) * 13
    return (wide % unnoted(dtype)).astype(dtype)


def note(tree: Tree, dtype: np.dtype) -> None:
    """Note what an engine returns of each segment: from what is known on, up to the token before the last."""
    for node in tree.nodes:
        if node.id != ROOT and not node.observation and node.tokens:
            path = tree.prefix(node.id)
            begin = tree.noted(node.parent)
            tree.note(node.id, Experts(experts_of(path[begin:-1], dtype)), begin)


def batch_of(trees: list[Tree]) -> Batch:
    segments = Segments.from_trees(trees, range(len(trees)))
    leaves = segments.leaf_count
    return Batch(segments, fold(segments, np.linspace(-2, 1.7, leaves), np.ones(leaves)))


def check(packed: Pack, dtype: np.dtype) -> None:
    """Every token has its own experts or none, and every predicting token has them."""
    if packed.experts is None:
        # No segment has a token: no engine was asked.
        assert not len(packed.predictor)
        return
    assert packed.experts.dtype == dtype
    assert packed.experts.shape == (len(packed.tokens), LAYERS, TOP_K)
    known = packed.experts[:, 0, 0] != unnoted(dtype)
    assert (packed.experts[~known] == unnoted(dtype)).all()
    assert (packed.experts[known] == experts_of(packed.tokens[known], dtype)).all()
    place = packed.predictor if packed.local is None else packed.local[packed.predictor]
    assert known[place].all()


@examples(80)
@given(forests(), st.sampled_from([128, 256]), st.integers(1, 2), st.integers(0, 9))
def test_packs_have_the_experts_of_their_tokens(trees, num_experts, replicas, spare):
    dtype = dtype_of(num_experts)
    for tree in trees:
        note(tree, dtype)
    whole = batch_of(trees)
    # As short as the longest path: wide trees are cut, and their ancestors stand in several packs.
    limit = int((whole.segments.position + whole.segments.length).max()) + spare
    dealt = deal_forest(whole.segments, dp_size=replicas, max_tokens=limit)
    for replica in range(replicas):
        for packed in lay_out(whole, dealt, dp_rank=replica, multiple=8).packs:
            if packed.blocks:
                check(packed, dtype)
                for rank in range(2):
                    check(own_part(packed, 2, rank), dtype)


@examples(40)
@given(forests(), st.data())
def test_experts_travel_with_tokens(trees, data):
    dtype = dtype_of(128)
    # A tree that was sampled without the key carries none.
    carries = data.draw(st.lists(st.booleans(), min_size=len(trees), max_size=len(trees)))
    for tree, carried in zip(trees, carries, strict=True):
        if carried:
            note(tree, dtype)
    homes = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(trees), max_size=len(trees))))
    whole = batch_of(trees)
    limit = int((whole.segments.position + whole.segments.length).max())
    dealt = deal_forest(whole.segments, dp_size=2, max_tokens=limit)
    there = sent(trees)
    own = [
        Stretches.of([here if at == home else far for here, far, at in zip(trees, there, homes, strict=True)])
        for home in range(2)
    ]
    sent_by = Deliveries([wanted(whole.segments, dealt, homes)])
    for replica in range(2):
        parcels = {home: sent_by.contents([own[home]], replica, home) for home in range(2)}
        arrived = Batch(sent_by.assemble(replica, parcels)[0].furnish(whole.segments), whole.credit)
        pairs = zip(
            lay_out(arrived, dealt, dp_rank=replica).packs, lay_out(whole, dealt, dp_rank=replica).packs, strict=True
        )
        for got, want in pairs:
            # A replica whose trees carry none has packs without; replay treats both alike.
            if got.experts is None:
                assert want.experts is None or (want.experts == unnoted(dtype)).all()
            else:
                assert want.experts is not None and np.array_equal(got.experts, want.experts)


@examples(40)
@given(forests())
def test_experts_come_back_from_text_and_journal(trees):
    for tree in trees:
        note(tree, dtype_of(300))
        assert Tree.from_dict(json.loads(json.dumps(tree.to_dict()))) == tree
        there = to_tree(unpack(pack(to_record(tree))))
        assert [node.experts for node in there.nodes] == [node.experts for node in tree.nodes]


def test_a_cut_segment_keeps_what_is_noted():
    dtype = dtype_of(8)
    tree = Tree.start("p", [1, 2, 3])
    node = tree.add_child(ROOT)
    node.tokens, node.logprobs, tree.leaves = [4, 5, 6, 7], [-0.5] * 4, [1]
    note(tree, dtype)
    assert tree.noted(1) == 6, "the last token was never computed"
    second = tree.split(1, 2)
    assert np.array_equal(node.experts.ids, experts_of([4, 5], dtype))
    assert np.array_equal(second.experts.ids, experts_of([6], dtype))
    # What another request computes of the same tokens changes nothing; only the missing one is taken.
    tree.note(second.id, Experts(np.zeros((8, LAYERS, TOP_K), dtype)), 0)
    assert np.array_equal(second.experts.ids[:1], experts_of([6], dtype)) and len(second.experts) == 2
    assert not second.experts.ids[1].any() and tree.noted(second.id) == 7


def test_an_engine_without_routing_is_refused():
    rollout = RolloutConfig(routing_replay="old", max_response_len=16, n_samples_per_prompt=2, mode="sequential")
    rules = StopRules(frozenset({2}), lambda tokens: "", 16, 1, repetition_window=0)
    search = TreeSearch("p7", [5, 6], rollout, seed=1, stop=rules)
    want = search.wants()[0]
    with pytest.raises(RoutingMissing, match=r"'p7', node 1: the engine returned no routing.*routing_replay=off"):
        search.take(want.node_id, Segment([3, 2], [-0.5, -0.5], "stop"))
