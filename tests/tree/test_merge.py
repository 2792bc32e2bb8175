"""A merged forest is the trie of its paths: every prefix once, every leaf's path as it was, credit summed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from treepo_mega.tree import merge
from treepo_mega.tree.credit import Credit, fold, fold_nodes
from treepo_mega.tree.merge import MergeError, merge_equal
from treepo_mega.tree.node import Tree
from treepo_mega.tree.segments import Segments


def said(s: Segments, segment: int) -> list[int]:
    """The tokens of a segment, marked by who said them: an observation equals nothing that was sampled."""
    return [2 * t + s.trained[segment] for t in s.tokens[s.source[segment] : s.source[segment] + s.length[segment]]]


def prefixes(s: Segments, segment: int) -> list[tuple[int, tuple[int, ...]]]:
    """(group, path down to each token of `segment`), for all its tokens."""
    path: list[int] = []
    above = s.parent[segment]
    while above >= 0:
        path = [*said(s, int(above)), *path]
        above = s.parent[above]
    own = said(s, segment)
    return [(int(s.group[segment]), tuple(path + own[: end + 1])) for end in range(len(own))]


def path_of_leaf(s: Segments, leaf: int) -> tuple[int, ...]:
    segment, path = int(s.leaf_segment[leaf]), []
    while segment >= 0:
        path = [*said(s, segment), *path]
        segment = int(s.parent[segment])
    return tuple(path)


def few_symbols(trees: list[Tree], symbols: int) -> list[Tree]:
    """The same trees over an alphabet so small that siblings often begin alike."""
    for tree in trees:
        for node in tree.nodes:
            node.tokens = [token % symbols for token in node.tokens]
    return trees


@examples(150)
@given(forests(), st.integers(1, 3), st.data())
def test_every_prefix_is_there_once_with_all_the_credit_that_passed_it(trees, symbols, data):
    trees = few_symbols(trees, symbols)
    s = Segments.from_trees(trees, range(len(trees)))
    number = st.floats(-3, 3)
    if data.draw(st.booleans(), label="advantages by node"):
        nodes = sum(len(tree.nodes) for tree in trees)
        values = np.array(data.draw(st.lists(number, min_size=nodes, max_size=nodes)))
        credit = fold_nodes(s, values, np.ones(s.leaf_count))
    else:
        leaves = s.leaf_count
        values = np.array(data.draw(st.lists(number, min_size=leaves, max_size=leaves)))
        credit = fold(s, values, np.linspace(1, 2, leaves))
    merged = merge.merge(s)
    got, summed = merged.segments, merged.credit(credit)

    want: dict[tuple, np.ndarray] = {}
    trained = {}
    for i in range(len(s)):
        for prefix in prefixes(s, i):
            own = np.array([credit.A_pos[i], credit.A_neg[i], credit.n[i], credit.count[i]])
            want[prefix] = want.get(prefix, 0) + own
            trained[prefix] = bool(s.trained[i])
    seen = {}
    for i in range(len(got)):
        assert got.length[i] > 0
        for prefix in prefixes(got, i):
            assert prefix not in seen, "a prefix is kept once"
            seen[prefix] = np.array([summed.A_pos[i], summed.A_neg[i], summed.n[i], summed.count[i]])
            assert bool(got.trained[i]) == trained[prefix]
    assert seen.keys() == want.keys()
    for prefix, credits in want.items():
        assert seen[prefix] == pytest.approx(credits, rel=1e-12, abs=1e-12)
    # By the caller's numbers: the order of leaves in the forest may change, the trajectories may not.
    paths = {int(s.leaf_number[leaf]): path_of_leaf(s, leaf) for leaf in range(len(s.leaf_number))}
    assert {int(got.leaf_number[leaf]): path_of_leaf(got, leaf) for leaf in range(len(got.leaf_number))} == paths
    assert merged.leaf_sums(np.where(got.trained, got.length, 0)).tolist() == s.flat_lengths().tolist()
    # What the packs rely on: subtrees and leaves are intervals in pre-order.
    for i in range(len(got)):
        inside = [j for j in range(len(got)) if i in _ancestry(got, j)]
        assert inside == list(range(i, i + int(got.below[i])))
        ends = [leaf for leaf in range(len(got.leaf_segment)) if i in _ancestry(got, int(got.leaf_segment[leaf]))]
        assert ends == list(range(int(got.leaf_lo[i]), int(got.leaf_hi[i])))


def _ancestry(s: Segments, segment: int) -> set[int]:
    found = set()
    while segment >= 0:
        found.add(segment)
        segment = int(s.parent[segment])
    return found


def merged_picture() -> tuple[Segments, Credit]:
    """The tree in the module's picture, merged."""
    tree = Tree.start("p", [9])
    for tokens in ([1, 2, 3], [1, 2, 4]):
        child = tree.add_child(0)
        child.tokens, child.logprobs = tokens, [-0.5] * 3
        tree.leaves.append(child.id)
    s = Segments.from_trees([tree], [0])
    return merge_equal(s, fold(s, np.array([1.0, -1.0]), np.ones(2)))


def check_picture(got: Segments, credit: Credit) -> None:
    """The trie in the picture, with the credit of both paths on what they share."""
    assert got.length.tolist() == [1, 2, 1, 1] and got.parent.tolist() == [-1, 0, 1, 1]
    assert credit.A_pos.tolist() == [1, 1, 1, 0] and credit.A_neg.tolist() == [-1, -1, 0, -1]
    assert credit.count.tolist() == [2, 2, 1, 1]


def test_the_picture_of_the_module():
    got, credit = merged_picture()
    assert len(got) == 4
    check_picture(got, credit)


def test_an_empty_forest_stays_empty():
    s = Segments.from_trees([], [])
    got, _ = merge_equal(s, fold(s, np.zeros(0), np.zeros(0)))
    assert len(got) == 0


def confusing(salts: set[int], monkeypatch) -> None:
    """Hashes of these salts are all alike."""
    plain = merge._prefix_hashes

    def hashes(*args):
        found = plain(*args)
        return found * np.uint64(0) if args[-1] in salts else found

    monkeypatch.setattr(merge, "_prefix_hashes", hashes)


@pytest.mark.parametrize("salts", [{0}, {0, 1, 2}])
def test_a_collision_is_met_with_another_hash(salts, monkeypatch):
    confusing(salts, monkeypatch)
    got, credit = merged_picture()
    assert len(got) == 4
    check_picture(got, credit)


def test_arrays_that_no_hash_can_tell_apart_are_an_error(monkeypatch):
    confusing(set(merge.SALTS), monkeypatch)
    with pytest.raises(MergeError, match="4 hashes in a row confused two prefixes of 7 tokens"):
        merged_picture()
