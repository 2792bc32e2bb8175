"""Plans of ranks that hold parts of a forest: equal to those of a rank that holds it all, whatever is shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from tests.tree.parts import assert_equal, sent
from tests.tree.test_merge import few_symbols
from treepo_mega.tree.alike import Alike
from treepo_mega.tree.credit import fold, leaf_weights
from treepo_mega.tree.deal import deal_forest
from treepo_mega.tree.merge import MergeError, compare, merge_equal
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch, lay_out
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.stretches import Deliveries, Stretches, StretchMissing, Wants, wanted


def batch_of(trees: list[Tree], sharing: str, *, alike: bool = False) -> Batch:
    segments = Segments.from_trees(trees, range(len(trees)), "tree" if sharing == "content" else sharing)
    leaves = segments.leaf_count
    credit = fold(segments, np.linspace(-2, 1.7, leaves), leaf_weights("token-mean", segments.flat_lengths()))
    if sharing != "content":
        return Batch(segments, credit)
    told = Alike.joined([tree.alike for tree in trees if tree.alike is not None]) if alike else None
    return Batch(*merge_equal(segments, credit, told))


@examples(120)
@given(forests(), st.sampled_from(["tree", "prompt", "none", "content"]), st.integers(1, 3), st.data())
def test_parts_plan_as_the_whole(trees, sharing, replicas, data):
    trees = few_symbols(trees, data.draw(st.integers(1, 3), label="symbols"))
    homes = data.draw(st.integers(1, 3), label="homes")
    home_of_tree = np.array(data.draw(st.lists(st.integers(0, homes - 1), min_size=len(trees), max_size=len(trees))))
    for tree in trees:
        tree.alike = compare(tree)
    gone = data.draw(st.integers(0, 3), label="leaf that is dropped after the trees were told")
    there = sent(trees)
    held = [[here if at == home else far for here, far, at in zip(trees, there, home_of_tree, strict=True)]
            for home in range(homes)]  # fmt: skip
    keeps = [[i for i in range(len(tree.leaves)) if len(tree.leaves) == 1 or i != gone] for tree in trees]

    def pruned(forest: list[Tree]) -> list[Tree]:
        return [tree.only(keep) for tree, keep in zip(forest, keeps, strict=True)]

    whole = batch_of(pruned(trees), sharing)
    longest = int((whole.segments.position + whole.segments.length).max())
    limit = data.draw(st.integers(longest, longest + 12), label="max_tokens")
    want = deal_forest(whole.segments, dp_size=replicas, max_tokens=limit, pair_cost=0.01)

    parts = [batch_of(pruned(forest), sharing, alike=True) for forest in held]
    own = [Stretches.of(pruned(forest)) for forest in held]
    for replica in range(replicas):
        expected = lay_out(whole, want, dp_rank=replica)
        for part in parts:
            dealt = deal_forest(part.segments, dp_size=replicas, max_tokens=limit, pair_cost=0.01)
            assert dealt.per_rank == want.per_rank
            wants = wanted(part.segments, dealt, home_of_tree)
            # Two optimizer steps of the same trees: parcels hold both.
            sent_by = Deliveries([wants, wants])
            parcels = {home: sent_by.contents([own[home]] * 2, replica, home) for home in range(homes)}
            sizes = sent_by.tokens_between(replicas, homes)
            assert [len(parcels[home][0]) for home in range(homes)] == sizes[replica].tolist()
            arrived = sent_by.assemble(replica, parcels)[1]
            furnished = Batch(arrived.furnish(part.segments), part.credit)
            assert_equal(lay_out(furnished, dealt, dp_rank=replica), expected)
            # Every token that a pack holds is fetched once, and nothing else.
            unlike = {token for chosen in dealt.per_rank[replica] for token in addresses(part, dealt.pieces, chosen)}
            assert wants.of(replica=replica).tokens == len(unlike)


def addresses(batch: Batch, pieces, piece: int) -> set[int]:
    segments = pieces.segment_of_entry[pieces.entries([piece])]
    return {int(batch.segments.source[s]) + offset for s in segments for offset in range(int(batch.segments.length[s]))}


def two_trees() -> list[Tree]:
    trees = []
    for name in "pq":
        tree = Tree.start(name, [1, 2])
        child = tree.add_child(0)
        child.tokens, child.logprobs, tree.leaves = [3, 4, 5], [-0.5] * 3, [1]
        trees.append(tree)
    return trees


def test_what_is_not_held_is_named_and_cannot_be_read():
    here, far = two_trees()
    forest = [here, sent([far])[0]]
    own = Stretches.of(forest)
    wants = Wants(*(np.array([number]) for number in (0, 0, 5, 2)))
    with pytest.raises(StretchMissing, match="2 tokens from address 5 on are not held here"):
        own.take(wants)
    batch = batch_of(forest, "tree")
    batch.segments = own.furnish(batch.segments)
    dealt = deal_forest(batch.segments, dp_size=2, max_tokens=9)
    lay_out(batch, dealt, dp_rank=0)
    with pytest.raises(IndexError):
        lay_out(batch, dealt, dp_rank=1)


def test_equal_parts_of_another_forest_are_refused():
    here, other = two_trees()
    other.nodes[1].tokens.append(9)
    other.nodes[1].logprobs.append(-1.0)
    s = Segments.from_trees([here], [0])
    with pytest.raises(MergeError, match="4 tokens of node 1 were compared, and it has 3"):
        merge_equal(s, fold(s, np.ones(1), np.ones(1)), compare(other))
