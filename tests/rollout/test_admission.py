"""What runs now: never more blocks than the cache holds, every segment's turn comes, begun trees go first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.rollouts import rollout_config
from treepo_mega.rollout.admission import Admission, CacheTooSmall, Key
from treepo_mega.rollout.requests import spans_of
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.search import Segment, TreeSearch, Want
from treepo_mega.tree.stop import StopRules

EOS = 0


def blocks_in_use(room: Admission, texts: dict[Key, tuple[list[int], int]]) -> int:
    """What a prefix-caching engine holds for the running segments: distinct full blocks of prefixes, and their own."""
    size, shared, own = room.block_size, set(), 0
    for key in room.running:
        prefix, tokens = texts[key]
        full = (len(prefix) - 1) // size  # of a prefix that ends with a block, the last one is computed again
        shared |= {(key[0], tuple(prefix[: (i + 1) * size])) for i in range(full)}
        own += -(-(len(prefix) + tokens) // size) - full
    return len(shared) + own


@examples(60)
@given(
    st.integers(1, 5),
    st.integers(12, 40),
    st.integers(2, 9),
    st.integers(1, 6),
    st.sampled_from(["level", "quota", "fork"]),
    st.integers(0, 999),
)
def test_no_more_than_the_cache_holds_and_everything_in_the_end(trees, blocks, block_size, most, transfer, seed):
    rule = {"branching__at": "fork"} if transfer == "fork" else {"branching__transfer": transfer}
    rule |= {"branching__fork__signal": "logprob", "branching__fork__draw": "other"}
    cfg = rollout_config(n_samples_per_prompt=6, segment__length=4, max_response_len=16, **rule)
    stop = StopRules.from_config(cfg, [EOS], str)
    searches = [TreeSearch(f"p{k}", [7] * (3 + k), cfg, seed=seed + k, stop=stop) for k in range(trees)]
    room, rng = Admission(blocks, block_size, most), random.Random(seed)
    texts: dict[Key, tuple[list[int], int]] = {}
    wants: dict[Key, Want] = {}
    begun, order, rests = 0, [], [0] * trees

    def ask(rank: int) -> None:
        search = searches[rank]
        new = search.wants()
        if new or search.done:
            room.settle(rank)
        if cfg.forks and (rests[rank] != search.rests or search.done):
            rests[rank] = search.rests
            room.hold(rank, {} if search.done else spans_of(search.tree))
        for want in new:
            node = search.tree.nodes[want.node_id]
            lengths = [len(search.tree.nodes[i].tokens) for i in search.tree.ancestry(node.parent)]
            room.want(rank, node.path, lengths, want.max_tokens)
            wants[rank, node.path], texts[rank, node.path] = want, (want.prefix, want.max_tokens)

    while True:
        order += room.admit()
        while room.idle and begun < trees:
            ask(begun)
            begun += 1
            order += room.admit()
        if not room.running:
            break
        assert len(room.running) <= most
        alone = len(room.running) == 1
        assert blocks_in_use(room, texts) <= blocks or alone
        key = rng.choice(sorted(room.running))
        want, draw = wants.pop(key), random.Random(derive_seed(seed, *key[1]))
        tokens = [draw.randrange(1, 9) for _ in range(want.max_tokens)]
        room.finish(*key, keep=cfg.forks)
        top = [(token, -1.0) for token in range(1, 9)][: want.top]
        searches[key[0]].take(want.node_id, Segment(tokens, [-1.0] * len(tokens), "length", top=top))
        ask(key[0])
    assert all(s.done and len(s.tree.leaves) == 6 for s in searches) and not wants
    assert room.used == 0, "everything that was booked was given back"
    first = [next(i for i, k in enumerate(order) if k[0] == rank) for rank in range(trees)]
    assert first == sorted(first), "trees begin in their order"


def test_siblings_share_their_prefix_and_it_stays_booked_until_the_tree_goes_on():
    room = Admission(100, 8, 16)
    room.want(0, (0,), [33], 8)
    room.want(0, (1,), [33], 8)
    assert room.admit() == [(0, (0,)), (0, (1,))]
    assert room.used == 4 + 2 + 2, "four full blocks once, two more for each of the siblings"
    room.finish(0, (0,))
    room.finish(0, (1,))
    assert room.used == 4, "the prefix waits for what comes next"
    room.want(0, (0, 0), [33, 8], 8)
    room.settle(0)
    assert room.admit() == [(0, (0, 0))] and room.used == 4 + 1 + 2
    room.grow(0, (0, 0), 24)
    assert room.used == 4 + 1 + 4, "a run books on as it grows"
    room.finish(0, (0, 0))
    room.settle(0)
    assert room.used == 0


def test_what_a_tree_holds_stays_booked_while_others_run_and_makes_way_when_none_does():
    room = Admission(20, 8, 16)
    room.want(0, (0,), [8], 40)
    room.want(0, (1,), [8], 40)
    assert len(room.admit()) == 2 and room.used == 1 + 6 + 6
    room.finish(0, (0,), keep=True)
    assert room.used == 13, "a trunk's blocks are kept until its tree is at rest"
    room.finish(0, (1,), keep=True)
    room.settle(0)
    # A trunk is cut at token 20: the prompt's block, one before the cut, four behind it; the other trunk's five.
    spans = {(): (0, 8), (0,): (8, 20), (1,): (8, 48), (0, 0): (20, 48)}
    room.hold(0, spans)
    assert room.used == 1 + 1 + 5 + 4
    room.want(2, (0,), [8], 8)
    assert room.admit() == [(2, (0,))] and room.used == 14
    room.want(1, (0,), [8], 40)
    assert room.admit() == [], "six blocks are free, and seven are needed"
    room.want(0, (0, 1), [8, 12], 28)
    assert room.admit() == [(0, (0, 1))] and room.used == 18, "its prefix is booked already"
    room.finish(0, (0, 1), keep=True)
    room.settle(0)
    assert room.admit() == [] and room.used == 18
    room.finish(2, (0,))
    room.settle(2)
    assert room.used == 15 and room.admit() == [(1, (0,))], "nothing runs: what is held makes way"
    assert room.used == 7
    room.hold(0, {})
    room.finish(1, (0,))
    room.settle(1)
    assert room.used == 0


def test_begun_trees_go_before_new_ones_and_waiting_ends():
    room = Admission(12, 8, 16)
    room.want(1, (0,), [8], 40)
    assert room.admit() == [(1, (0,))] and not room.admit()
    room.want(2, (0,), [8], 40)
    room.want(0, (0, 0), [8, 8], 16)
    assert room.admit() == [(0, (0, 0))], "the older tree first, although it came later"
    assert not room.admit() and not room.idle
    room.finish(1, (0,))
    room.finish(0, (0, 0))
    assert room.admit() == [(2, (0,))], "nothing runs: prefixes that are only kept for later make way"


def test_a_path_that_can_never_fit_is_an_error_that_names_the_key():
    room = Admission(4, 8, 16)
    with pytest.raises(CacheTooSmall, match=r"path of 40 tokens needs 5 KV blocks of 8.*has 4.*kv_cache_memory_mb"):
        room.want(0, (0,), [8], 32)
