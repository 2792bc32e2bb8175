"""Packs and plans: every trajectory once, prompts whole, caps kept, equal shapes on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_mega.tree.pack import Trajectory, balance, flat_pack, plan_step, split_steps


@st.composite
def batches(draw):
    """Trajectories of 1 to 6 prompts; token ids are unique, so that each can be found again."""
    out, at = [], 1000
    for prompt in range(draw(st.integers(1, 6))):
        prompt_len = draw(st.integers(1, 7))
        for _ in range(draw(st.integers(1, 5))):
            size = prompt_len + draw(st.integers(1, 20))
            advantage = draw(st.floats(-3, 3, width=32))
            logprobs = [-(at + i) / 1000 for i in range(size - prompt_len)]
            out.append(Trajectory(prompt, list(range(at, at + size)), prompt_len, advantage, logprobs))
            at += size
    return out


def unpack(pack):
    """The pack's trajectories as (tokens, rows): what a model would be asked for each of them."""
    row = {int(p): i for i, p in enumerate(pack.predictor)}
    for start, end in pack.blocks:
        yield pack.tokens[start:end].tolist(), [row[p] for p in range(start, end) if p in row]


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 4), st.integers(27, 120), st.integers(1, 5), st.sampled_from([1, 2, 8]))
def test_plan_covers_every_trajectory_once(batch, dp_size, max_tokens, count_multiple, multiple):
    plans = [
        plan_step(
            batch, dp_size=dp_size, dp_rank=r, max_tokens=max_tokens, multiple=multiple,
            count_multiple=count_multiple, pad_id=7,
        )
        for r in range(dp_size)
    ]  # fmt: skip
    packs = [p for plan in plans for p in plan.packs]
    # Megatron's schedules: one length, one count.
    assert len({len(p.tokens) for p in packs}) == 1
    assert len({len(plan.packs) for plan in plans}) == 1
    assert len(plans[0].packs) % count_multiple == 0
    length = len(packs[0].tokens)
    assert length % multiple == 0
    assert all(sum(e - s for s, e in p.blocks) <= max_tokens for p in packs)
    assert length < max_tokens + multiple

    seen = [(tokens, rows, p) for p in packs for tokens, rows in unpack(p)]
    assert sorted(t for t, _, _ in seen) == sorted(t.tokens for t in batch)
    by_tokens = {tuple(t.tokens): t for t in batch}
    for tokens, rows, p in seen:
        t = by_tokens[tuple(tokens)]
        assert p.target[rows].tolist() == tokens[t.prompt_len :], "one row per response token, in order"
        assert p.tokens[p.predictor[rows]].tolist() == tokens[t.prompt_len - 1 : -1], "predicted by the one before"
        assert p.position[p.predictor[rows]].tolist() == list(range(t.prompt_len - 1, len(tokens) - 1))
        assert p.rollout_logprobs[rows].tolist() == np.float32(t.rollout_logprobs).tolist()
        assert (p.A_pos[rows] == max(np.float32(t.advantage), 0)).all()
        assert (p.A_neg[rows] == min(np.float32(t.advantage), 0)).all()
        assert (p.n[rows] == 1).all()
    assert sum(p.pairs for p in packs) == sum(t.response_len for t in batch)
    for plan in plans:
        assert plan.padded_tokens == length * len(plan.packs)
        assert plan.real_tokens == sum(e - s for p in plan.packs for s, e in p.blocks)
        assert sorted(t for p in plan.packs for t, _ in unpack(p)) == sorted(t.tokens for t in plan.trajectories)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 6))
def test_steps_keep_prompts_whole(batch, steps):
    groups = split_steps(batch, steps)
    assert len(groups) == steps
    assert [t for g in groups for t in g] == batch, "in order, each once"
    where = [{t.prompt_index for t in g} for g in groups]
    assert sum(map(len, where)) == len(set().union(*where))
    counts = [len(w) for w in where]
    assert max(counts) - min(counts) <= 1


def test_prompt_numbers_may_have_gaps():
    batch = [Trajectory(i, [1, 2], 1, 0.0, [0.0]) for i in (3, 3, 10, 40, 41)]
    assert [[t.prompt_index for t in g] for g in split_steps(batch, 2)] == [[3, 3, 10], [40, 41]]


def test_visibility_is_causal_within_a_trajectory_and_padding_sees_itself():
    a, b = Trajectory(0, [5, 6, 7], 1, 1.0, [-0.1, -0.2]), Trajectory(1, [8, 9], 1, -1.0, [-0.3])
    pack = flat_pack([a, b], 7, pad_id=3)
    i, j = np.arange(7)[:, None], np.arange(7)[None]
    visible = (j <= i) & (i < pack.subtree_end[None])
    block = np.array([0, 0, 0, 1, 1, 2, 3])
    assert (visible == ((j <= i) & (block[:, None] == block[None]))).all()
    assert pack.tokens.tolist() == [5, 6, 7, 8, 9, 3, 3]
    assert pack.position.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert pack.blocks == [(0, 3), (3, 5)]
    assert (pack.predictor.tolist(), pack.target.tolist()) == ([0, 1, 3], [6, 7, 9])
    assert pack.A_pos.tolist() == [1, 1, 0] and pack.A_neg.tolist() == [0, 0, -1]


def test_a_pack_of_padding_has_no_rows():
    pack = flat_pack([], 4)
    assert pack.blocks == [] and pack.pairs == 0
    assert len(pack.predictor) == len(pack.target) == len(pack.A_pos) == len(pack.rollout_logprobs) == 0
    assert pack.predictor.dtype == np.int64


def test_ranks_without_trajectories_get_padding():
    one = [Trajectory(0, [1, 2, 3], 1, 1.0, [0.0, 0.0])]
    plans = [plan_step(one, dp_size=3, dp_rank=r, max_tokens=8, count_multiple=2) for r in range(3)]
    assert [sum(p.pairs for p in plan.packs) for plan in plans] == [2, 0, 0]
    assert {len(plan.packs) for plan in plans} == {2}


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 5))
def test_balance_deals_all_and_stays_near_even(costs, bins):
    dealt = balance(costs, bins)
    assert sorted(i for b in dealt for i in b) == list(range(len(costs)))
    loads = [sum(costs[i] for i in b) for b in dealt]
    # Longest-first greedy: the gap is at most one item, since the last one went to the emptiest bin.
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert dealt == balance(costs, bins)


def test_plans_do_not_depend_on_the_rank_that_asks():
    batch = [Trajectory(i, list(range(10 * i, 10 * i + 3 + i)), 2, 0.5, [0.0] * (1 + i)) for i in range(6)]
    lengths = {len(plan_step(batch, dp_size=2, dp_rank=r, max_tokens=20).packs[0].tokens) for r in (0, 1)}
    assert len(lengths) == 1


def test_what_does_not_fit_is_an_error():
    long = Trajectory(0, list(range(9)), 2, 1.0, [0.0] * 7)
    with pytest.raises(ValueError, match="a trajectory of 9 tokens does not fit max_tokens_per_gpu=8"):
        plan_step([long], dp_size=1, dp_rank=0, max_tokens=8)
    with pytest.raises(ValueError, match="do not fit a pack of 8"):
        flat_pack([long], 8)
