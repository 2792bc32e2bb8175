"""Prompts over engines: dealt evenly by cost, each begun exactly once, stolen from whoever has the most left."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.data.prompts import Prompt
from treepo_mega.rollout.dealing import (
    DEADLINE_STEPS,
    WORDS_A_BLOCK,
    CostModel,
    DealingTimeout,
    LocalQueue,
    SharedQueue,
    deal_by_cost,
    deal_to,
)
from treepo_mega.tree.node import Tree

costs = st.lists(st.floats(0, 1000), max_size=40)


@examples(100)
@given(costs, st.integers(1, 6))
def test_everyone_is_dealt_alike_and_the_longest_come_first(cost, engines):
    deal = deal_by_cost(cost, engines)
    assert sorted(i for part in deal for i in part) == list(range(len(cost)))
    for part in deal:
        assert [cost[i] for i in part] == sorted((cost[i] for i in part), reverse=True)
    loads = [sum(cost[i] for i in part) for part in deal]
    assert max(loads) - min(loads) <= max(cost, default=0) + 1e-6, "no engine has a prompt's worth more than another"


@examples(100)
@given(costs, st.integers(1, 6), st.randoms(use_true_random=False))
def test_what_is_pinned_counts_in_the_loads_of_its_engine(cost, engines, rng):
    engine_of = [rng.choice([None, *range(engines)]) for _ in cost]
    pinned = deal_to(engine_of, cost, engines)
    deal = deal_by_cost(cost, engines, pinned)
    both = [[*own, *part] for own, part in zip(pinned, deal, strict=True)]
    assert sorted(i for part in both for i in part) == list(range(len(cost)))
    for engine, part in enumerate(pinned):
        assert set(part) == {i for i, of in enumerate(engine_of) if of == engine}
    free = [cost[i] for i, of in enumerate(engine_of) if of is None]
    loads = [sum(cost[i] for i in part) for part in both]
    dealt = [load for load, part in zip(loads, deal, strict=True) if part]
    # Nothing was added to an engine that another one was below by more than what was added.
    assert max(dealt, default=0) - min(loads) <= max(free, default=0) + 1e-6


@examples(60)
@given(costs, st.integers(1, 5), st.randoms(use_true_random=False), st.booleans())
def test_every_prompt_is_begun_once_whoever_is_fast_and_pinned_ones_by_their_engine(cost, engines, rng, pins):
    engine_of = [rng.choice([None, *range(engines)]) if pins else None for _ in cost]
    store, pinned = dist.HashStore(), deal_to(engine_of, cost, engines)
    deal = deal_by_cost(cost, engines, pinned)
    queues = [SharedQueue(store, "r", deal, cost, e, pinned=pinned[e]) for e in range(engines)]
    begun: list[tuple[int, int]] = []
    active = list(range(engines))
    while active:
        e = rng.choice(active)
        i = queues[e].take()
        if i is None:
            i = queues[e].take(dry=True)
        if i is None:
            active.remove(e)
            assert queues[e].take(dry=True) is None, "no more now means no more later"
        else:
            begun.append((e, i))
    assert sorted(i for _, i in begun) == list(range(len(cost)))
    for engine in range(engines):
        mine = [i for e, i in begun if e == engine]
        assert mine[: len(pinned[engine])] == pinned[engine], "before all others"
    home = {i: e for e in range(engines) for i in (*deal[e], *pinned[e])}
    assert sum(q.stolen for q in queues) == sum(home[i] != e for e, i in begun)


def test_who_runs_dry_takes_the_longest_that_the_richest_has_not_begun():
    cost = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    store, deal = dist.HashStore(), [[0, 1], [2], [3, 4, 5]]
    a, b, _ = (SharedQueue(store, "r", deal, cost, e) for e in range(3))
    assert b.take(dry=True) == 2
    assert b.take(dry=True) is None, "its own list is empty, but what it began may still run"
    assert b.take() is None, "it runs"
    assert b.take(dry=True) == 0, "17 are left at the first, 15 at the third"
    assert b.take(dry=True) == 3 and b.take(dry=True) == 4, "now the third has more: its next, in its order"
    assert a.take() == 1 and a.take() is None and a.take(dry=True) == 5 and a.take(dry=True) is None
    assert (a.stolen, b.stolen) == (1, 3)


def test_an_engine_that_was_dealt_nothing_steals_at_once():
    queue = SharedQueue(dist.HashStore(), "r", [[0, 1], []], [1.0, 1.0], 1)
    assert queue.take() is None and queue.take(dry=True) == 0


def test_ranks_of_one_engine_make_the_same_moves():
    store, deal = dist.HashStore(), [[2, 0], [1]]
    leader, follower = (SharedQueue(store, "r", deal, [1.0] * 3, 0, rank=r, ranks=2, timeout_s=20) for r in (0, 1))
    seen: list[int | None] = []
    dry = [True, False, False, False, True, True]
    thread = threading.Thread(target=lambda: seen.extend(follower.take(d) for d in dry))
    thread.start()
    mine = [leader.take(d) for d in dry]
    thread.join(timeout=30)
    assert mine == seen == [2, 0, None, None, 1, None]
    pinned = [SharedQueue(store, "p", [[], []], [1.0] * 3, 0, pinned=[2], rank=r, ranks=2) for r in (0, 1)]
    assert [[queue.take(d) for d in (False, False, True)] for queue in pinned] == [[2, None, None]] * 2


def test_a_leader_that_never_takes_is_noticed_within_the_deadline():
    follower = SharedQueue(dist.HashStore(), "r", [[0], []], [1.0], 0, rank=1, ranks=2, timeout_s=0.2)
    with pytest.raises(DealingTimeout, match="engine 0 waited 0 s for its first rank to take a prompt"):
        follower.take()


def test_the_first_rank_decides_about_the_deadline_and_all_leave_at_the_same_step():
    store = dist.HashStore()
    leader, follower = (SharedQueue(store, "r", [[0]], [1.0], 0, rank=r, ranks=2, timeout_s=20) for r in (0, 1))
    step_of_the_engine = threading.Barrier(2, timeout=20)

    def sample(queue: SharedQueue, late_from: int) -> list[bool]:
        said = []
        for step in range(2 * DEADLINE_STEPS + 1):
            step_of_the_engine.wait()
            said.append(queue.deadline_passed(step >= late_from))
        return said

    theirs: list[bool] = []
    # The follower's clock says at once that time is up, the leader's only in the middle of an interval.
    thread = threading.Thread(target=lambda: theirs.extend(sample(follower, 0)))
    thread.start()
    mine = sample(leader, DEADLINE_STEPS + 3)
    thread.join(timeout=30)
    assert mine == theirs == [False] * 2 * DEADLINE_STEPS + [True]


def test_words_about_the_deadline_do_not_pile_up_in_the_store():
    store = dist.HashStore()
    ranks = [SharedQueue(store, "r", [[0]], [1.0], 0, rank=rank, ranks=3, timeout_s=20) for rank in range(3)]

    def ask(queue: SharedQueue) -> None:
        for _ in range(20 * DEADLINE_STEPS * WORDS_A_BLOCK):
            queue.deadline_passed(False)
        assert store.num_keys() <= 2 * WORDS_A_BLOCK + 4

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(ask, queue) for queue in ranks]:
            done.result(timeout=60)


def test_a_first_rank_never_runs_ahead_of_what_the_others_have_read():
    store = dist.HashStore()
    leader, follower = (SharedQueue(store, "r", [[0]], [1.0], 0, rank=r, ranks=2, timeout_s=20) for r in (0, 1))
    words = list(range(5 * WORDS_A_BLOCK))
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(lambda: [leader.agree(word, "count") for word in words])
        time.sleep(0.2)
        assert not told.done(), "it waits for the first block to be read"
        assert [follower.agree(None, "count") for _ in words] == words == told.result(timeout=20)
    alone = SharedQueue(dist.HashStore(), "r", [[0]], [1.0], 0, rank=0, ranks=2, timeout_s=0.2)
    for word in words[: 2 * WORDS_A_BLOCK]:
        alone.agree(word, "count")
    with pytest.raises(DealingTimeout, match="waited 0 s for its other ranks to read older words"):
        alone.agree(0, "count")


def test_an_engine_of_one_rank_keeps_to_its_own_clock():
    alone = SharedQueue(dist.HashStore(), "r", [[0], []], [1.0], 0)
    for queue in (alone, LocalQueue([0])):
        assert [queue.deadline_passed(passed) for passed in (False, False, True)] == [False, False, True]


def test_a_local_queue_is_its_order():
    queue = LocalQueue([2, 0])
    assert [queue.take() for _ in range(3)] == [2, 0, None] and queue.stolen == 0


def test_costs_are_learnt_by_prompt_then_by_source():
    def prompt(name: str, tokens: int, source: str) -> Prompt:
        return Prompt(name, "", [5] * tokens, "", "exact", source)

    def tree(length: int) -> Tree:
        t = Tree.start("p", [1])
        node = t.add_child(0)
        node.tokens, t.leaves = [5] * length, [node.id]
        return t

    costs = CostModel()
    short, long, new = prompt("a", 3, "easy"), prompt("b", 4, "hard"), prompt("c", 5, "hard")
    assert [costs.expected(p) for p in (short, long)] == [3, 4], "at first only the prompts' lengths are known"
    costs.update([short, long], [tree(10), tree(100)])
    assert [costs.expected(p) for p in (short, long, new)] == [13, 104, 105]
    costs.update([new], [tree(200)])
    again = CostModel()
    again.load_state_dict(json.loads(json.dumps(costs.state_dict())))
    assert [again.expected(p) for p in (short, long, new)] == [costs.expected(p) for p in (short, long, new)]
    assert costs.expected(long) == 104 and costs.expected(prompt("d", 1, "hard")) == 1 + 0.8 * 100 + 0.2 * 200


def test_the_stores_of_torch_do_what_is_asked_of_them():
    store = dist.PrefixStore("x", dist.HashStore())
    assert store.add("n", 1) == 1 and store.add("n", 0) == 1
    store.set("k", "3")
    store.wait(["k"], timedelta(seconds=1))
    assert store.get("k") == b"3"
