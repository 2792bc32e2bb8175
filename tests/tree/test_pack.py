"""Packs and plans, by their meaning: what each trajectory sees, is asked for and weighs, however it was laid out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import contexts, forests, spoken
from treepo_mega.config import ConfigError
from treepo_mega.tree.credit import fold, fold_nodes, leaf_weights
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch, Trajectory, own_part, plan_step, split_steps
from treepo_mega.tree.segments import Segments

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def batch_of(trees, sharing, mode, advantages):
    s = Segments.from_trees(trees, range(len(trees)), sharing)
    return Batch(s, fold(s, np.array(advantages), leaf_weights(mode, s.flat_lengths())))


def visible(pack, i):
    """Tokens that pack index i attends to, in order: by the pack's rule."""
    j = np.arange(i + 1)
    return pack.tokens[j[(i < pack.subtree_end[: i + 1])]].tolist()


def rows_by_context(packs):
    """{(context..., target): row}: what each row is asked; fails when two rows ask the same."""
    out = {}
    for p in packs:
        for r, at in enumerate(p.predictor.tolist()):
            at = at if p.local is None else int(p.local[at])
            context = visible(p, at)
            assert p.position[at] == len(context) - 1, "RoPE turns by the depth in the trajectory"
            key = (*context, int(p.target[r]))
            assert key not in out, "a token is counted once"
            out[key] = (p, r)
    return out


@examples(150)
@given(
    forests(), st.sampled_from(["tree", "prompt", "none"]), st.sampled_from(MODES), st.integers(1, 3),
    st.integers(0, 60), st.sampled_from([1, 8]), st.data(),
)  # fmt: skip
def test_every_token_of_every_trajectory(trees, sharing, mode, dp_size, extra, multiple, data):
    paths = [(t, leaf) for t in trees for leaf in t.leaves]
    flat = [context for t, leaf in paths for context in contexts(t, leaf)]
    longest = max(map(len, flat))
    advantages = [data.draw(st.floats(-3, 3)) for _ in paths]
    batch = batch_of(trees, sharing, mode, advantages)
    plans = [
        plan_step(batch, dp_size=dp_size, dp_rank=r, max_tokens=longest + extra, multiple=multiple, pad_id=7)
        for r in range(dp_size)
    ]
    packs = [p for plan in plans for p in plan.packs]
    assert len({len(plan.packs) for plan in plans}) == 1
    assert all(len(p.tokens) % multiple == 0 for p in packs)
    assert all(b <= longest + extra for p in packs for _, b in p.blocks), "caps are kept"
    assert sum(plan.flat_tokens for plan in plans) == sum(map(len, flat))

    lengths = [t.response_length(leaf) for t, leaf in paths]
    pairs, count = sum(lengths), sum(1 for x in lengths if x)
    want: dict[tuple[int, ...], list[float]] = {}
    for (t, leaf), a, size in zip(paths, advantages, lengths, strict=True):
        w = {"token-mean": 1.0, "seq-mean-token-mean": pairs / max(1, count * size),
             "seq-mean-token-sum": pairs / max(1, count)}[mode]  # fmt: skip
        # Observations are seen, and not predicted.
        for seen, token in spoken(t, leaf):
            cell = want.setdefault((*seen, token), [0.0, 0.0, 0.0, 0])
            cell[0] += w * max(a, 0)
            cell[1] += w * min(a, 0)
            cell[2] += w
            cell[3] += 1
    sums: dict[tuple[int, ...], list[float]] = {}
    for p in packs:
        for r, at in enumerate(p.predictor.tolist()):
            key = (*visible(p, at), int(p.target[r]))
            assert p.position[at] == len(key) - 2
            cell = sums.setdefault(key, [0.0, 0.0, 0.0, 0])
            for i, name in enumerate(("A_pos", "A_neg", "n", "count")):
                cell[i] += getattr(p, name)[r]
            assert p.rollout_logprobs[r] == -p.target[r] / 1000
    assert sums.keys() == want.keys()
    for key, cell in want.items():
        assert sums[key] == pytest.approx(cell, rel=1e-12, abs=1e-12)
    assert sum(p.pairs for p in packs) == pairs
    if sharing == "tree":
        rows_by_context(packs)


@examples(60)
@given(forests(), st.data())
def test_a_tree_in_one_pack_holds_every_token_once(trees, data):
    batch = batch_of(trees, "tree", "token-mean", [0.0] * sum(len(t.leaves) for t in trees))
    packs = plan_step(batch, dp_size=1, dp_rank=0, max_tokens=10_000).packs
    unique = sum(t.unique_tokens() + t.observation_tokens() + len(t.prompt_tokens) for t in trees)
    assert sum(e - s for p in packs for s, e in p.blocks) == unique
    assert len(packs) == 1 and len(packs[0].blocks) == len(trees)
    assert packs[0].attention_pairs == sum(len(visible(packs[0], i)) for i in range(packs[0].blocks[-1][1]))


@examples(60)
@given(forests(), st.sampled_from([2, 3]), st.integers(0, 40))
def test_context_parallel_ranks_share_rows_and_tokens(trees, cp_size, extra):
    batch = batch_of(trees, "tree", "token-mean", [0.5] * sum(len(t.leaves) for t in trees))
    most = max(len(c) for t in trees for leaf in t.leaves for c in contexts(t, leaf)) + extra
    whole = plan_step(batch, dp_size=1, dp_rank=0, max_tokens=most)
    parts = [
        plan_step(batch, dp_size=1, dp_rank=0, max_tokens=most, cp_size=cp_size, cp_rank=r).packs
        for r in range(cp_size)
    ]
    for group in zip(*parts, strict=True):
        owned = np.concatenate([p.local for p in group])
        assert sorted(owned.tolist()) == list(range(len(group[0].tokens))), "each token has one owner"
        assert len({len(p.local) for p in group}) == 1
        assert all((np.diff(p.local) > 0).all() for p in group)
    got = rows_by_context([p for ps in parts for p in ps])
    assert got.keys() == rows_by_context(whole.packs).keys()


def test_context_parallel_ranks_see_about_as_many_pairs():
    long = Trajectory(0, list(range(1024)), 1, 1.0, [0.0] * 1023)
    packs = [plan_step([long], dp_size=1, dp_rank=0, max_tokens=1024, cp_size=4, cp_rank=r).packs[0] for r in range(4)]
    seen = [int((p.position[p.local] + 1).sum()) for p in packs]
    assert max(seen) <= 1.02 * min(seen), "where contiguous halves would be 1 to 7"
    with pytest.raises(ValueError, match="1024 tokens does not divide into 12 chunks"):
        own_part(plan_step([long], dp_size=1, dp_rank=0, max_tokens=1024).packs[0], 3, 0)


@examples(60)
@given(forests(), st.sampled_from(["tree", "prompt", "none"]), st.data())
def test_node_advantages_reach_every_copy(trees, sharing, data):
    per_node = np.array([data.draw(st.floats(-2, 2)) for t in trees for _ in t.nodes])
    s = Segments.from_trees(trees, range(len(trees)), sharing)
    c = fold_nodes(s, per_node, leaf_weights("token-mean", s.flat_lengths()))
    packs = plan_step(Batch(s, c), dp_size=1, dp_rank=0, max_tokens=10_000).packs
    base = list(itertools.accumulate((len(t.nodes) for t in trees), initial=0))
    of = {t: (k, n.id) for k, tree in enumerate(trees) for n in tree.nodes for t in n.tokens}
    for p in packs:
        for r, token in enumerate(p.target.tolist()):
            k, node = of[token]
            a = per_node[base[k] + node]
            assert p.A_pos[r] == p.count[r] * max(a, 0) and p.A_neg[r] == p.count[r] * min(a, 0)


def test_one_row_per_child_at_a_branch():
    tree = Tree.start("p", [1, 2])
    stem = tree.add_child(0)
    stem.tokens, stem.logprobs = [3, 4], [-0.1, -0.2]
    for tokens in ([5], [6, 7], []):
        child = tree.add_child(stem.id)
        child.tokens, child.logprobs = tokens, [-0.5] * len(tokens)
    tree.leaves, tree.rewards = [2, 3, 4], [1.0, 0.0, 0.0]
    pack = plan_step(batch_of([tree], "tree", "token-mean", [2.0, -1.0, 0.5]), dp_size=1, dp_rank=0, max_tokens=9)
    (pack,) = pack.packs
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pack.position.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert pack.subtree_end.tolist() == [7, 7, 7, 7, 5, 7, 7]
    assert pack.predictor.tolist() == [1, 2, 3, 3, 5], "token 4 predicts two first tokens"
    assert pack.target.tolist() == [3, 4, 5, 6, 7]
    assert pack.count.tolist() == [3, 3, 1, 1, 1]
    assert pack.A_pos.tolist() == [2.5, 2.5, 2, 0, 0] and pack.A_neg.tolist() == [-1, -1, 0, -1, -1]
    assert pack.trajectory.tolist() == [0, 0, 0, 1, 1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 6))
def test_steps_keep_prompts_whole(prompts, steps):
    groups = split_steps(prompts, steps)
    assert len(groups) == steps
    assert sorted(i for g in groups for i in g) == list(range(len(prompts)))
    where = [{prompts[i] for i in g} for g in groups]
    assert sum(map(len, where)) == len(set(prompts))
    counts = [len(w) for w in where]
    assert max(counts) - min(counts) <= 1


def test_prompt_numbers_may_have_gaps():
    prompts = [3, 3, 10, 40, 41]
    assert [[prompts[i] for i in g] for g in split_steps(prompts, 2)] == [[3, 3, 10], [40, 41]]


def test_visibility_is_causal_within_a_trajectory_and_padding_sees_itself():
    a, b = Trajectory(0, [5, 6, 7], 1, 1.0, [-0.1, -0.2]), Trajectory(1, [8, 9], 1, -1.0, [-0.3])
    (pack,) = plan_step([a, b], dp_size=1, dp_rank=0, max_tokens=6, multiple=7, pad_id=3).packs
    i, j = np.arange(7)[:, None], np.arange(7)[None]
    seen = (j <= i) & (i < pack.subtree_end[None])
    block = np.array([0, 0, 0, 1, 1, 2, 3])
    assert (seen == ((j <= i) & (block[:, None] == block[None]))).all()
    assert pack.tokens.tolist() == [5, 6, 7, 8, 9, 3, 3]
    assert pack.position.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert pack.blocks == [(0, 3), (3, 5)]
    assert (pack.predictor.tolist(), pack.target.tolist()) == ([0, 1, 3], [6, 7, 9])
    assert pack.A_pos.tolist() == [1, 1, 0] and pack.A_neg.tolist() == [0, 0, -1]


def test_ranks_without_trajectories_get_packs_of_padding():
    one = [Trajectory(0, [1, 2, 3], 1, 1.0, [0.0, 0.0])]
    plans = [plan_step(one, dp_size=3, dp_rank=r, max_tokens=8, count_multiple=2) for r in range(3)]
    assert [sum(p.pairs for p in plan.packs) for plan in plans] == [2, 0, 0]
    assert {len(plan.packs) for plan in plans} == {2}
    empty = plans[2].packs[0]
    assert empty.blocks == [] and empty.pairs == empty.attention_pairs == 0 and empty.predictor.dtype == np.int64
    assert len(empty.tokens) == 2 and len(empty.target) == len(empty.A_pos) == len(empty.rollout_logprobs) == 0


def test_lengths_are_equal_where_the_pipeline_wants_them():
    paths = [Trajectory(i, list(range(n)), 1, 1.0, [0.0] * (n - 1)) for i, n in enumerate((30, 20, 7))]
    own = plan_step(paths, dp_size=1, dp_rank=0, max_tokens=30)
    equal = plan_step(paths, dp_size=1, dp_rank=0, max_tokens=30, equal_lengths=True)
    assert sorted(len(p.tokens) for p in own.packs) == [27, 30]
    assert [len(p.tokens) for p in equal.packs] == [30, 30]
    assert (own.padded_tokens, equal.padded_tokens, own.real_tokens) == (57, 60, 57)


def test_attention_pairs_count_when_ranks_are_balanced():
    paths = [Trajectory(0, list(range(60)), 1, 1.0, [0.0] * 59)]
    paths += [Trajectory(i, list(range(6)), 1, 1.0, [0.0] * 5) for i in range(1, 11)]
    by_tokens = plan_step(paths, dp_size=2, dp_rank=0, max_tokens=200)
    assert by_tokens.real_tokens == 60
    by_pairs = [plan_step(paths, dp_size=2, dp_rank=r, max_tokens=200, pair_cost=1.0) for r in (0, 1)]
    assert [p.real_tokens for p in by_pairs] == [60, 60], "the long one costs 1890: the short ones stay together"


def test_what_cannot_be_trained_on_is_an_error():
    long = Trajectory(0, list(range(9)), 2, 1.0, [0.0] * 7)
    with pytest.raises(ConfigError, match=r"a trajectory of 9 tokens does not fit train\.max_tokens_per_gpu=8"):
        plan_step([long], dp_size=1, dp_rank=0, max_tokens=8)
    tree = Tree.start("p", [])
    tree.add_child(0).tokens.append(1)
    tree.leaves = [1]
    with pytest.raises(ValueError, match="prompt 'p', node 1: 0 logprobs for 1 tokens"):
        Segments.from_trees([tree], [0])
    tree.nodes[1].logprobs = [0.0]
    with pytest.raises(ValueError, match="the prompt of tree 0 is empty"):
        Segments.from_trees([tree], [0])
    with pytest.raises(ValueError, match="trajectory 0: 1 logprobs for 2 tokens"):
        Segments.from_paths([Trajectory(0, [1, 2, 3], 1, 0.0, [0.0])])
    with pytest.raises(ValueError, match="loss_agg_mode 'mean'"):
        leaf_weights("mean", np.array([1]))
    tree.nodes[0].tokens = [1]
    with pytest.raises(ValueError, match="prefix sharing 'all'"):
        Segments.from_trees([tree], [0], "all")
