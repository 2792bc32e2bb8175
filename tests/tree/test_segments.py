"""Where segments end (KV blocks, reasoning steps), what a branch point is asked for, and budgets in tokens."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.rollouts import rollout_config
from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.budget import top_k_entropy
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch, Want
from treepo_mega.tree.stop import StopRules

EOS, BORDER = 0, 1


def config(**changes: object) -> RolloutConfig:
    values = {"n_samples_per_prompt": 8, "segment__length": 8, "max_response_len": 48, "branching__factor": 2}
    return rollout_config(**{**values, **changes})


def sample(want: Want, eos: float, borders: bool) -> list[int]:
    """Tokens as an engine that knows the border token would deliver them."""
    rng, tokens = random.Random(derive_seed(want.seed, *want.prefix)), []
    while len(tokens) < want.max_tokens:
        tokens.append(EOS if rng.random() < eos else rng.randrange(1, 9))
        if tokens[-1] == EOS or (borders and tokens[-1] == BORDER and len(tokens) >= want.min_tokens):
            break
    return tokens


def grow(cfg: RolloutConfig, seed: int, *, prompt: int = 5, align: int = 0, eos: float = 0.05) -> Tree:
    stop = StopRules.from_config(cfg, [EOS], lambda tokens: "".join(chr(97 + t) for t in tokens))
    search = TreeSearch("p", [7] * prompt, cfg, seed=seed, stop=stop, align=align)
    while not search.done:
        for want in search.wants():
            tokens = sample(want, eos, cfg.segment.end != "length")
            peek = [-0.5 - k for k in range(want.peek)]
            search.take(want.node_id, Segment(tokens, [-1.0] * len(tokens), "length", peek))
    return search.tree


@examples(60)
@given(st.integers(1, 70), st.integers(1, 24), st.sampled_from([1, 4, 16]), st.integers(0, 999))
def test_aligned_segments_end_one_token_behind_a_block_border(prompt, length, block, seed):
    tree = grow(config(segment__length=length, n_samples_per_prompt=4), seed, prompt=prompt, align=block)
    assert len(tree.leaves) == 4
    for node in tree.nodes[1:]:
        end = len(tree.prefix(node.id))
        if node.stop is None:
            assert end % block == 1 % block
            assert length <= len(node.tokens) < length + block, "stretched by less than a block, never shortened"


def test_only_the_first_segment_is_stretched_when_the_block_divides_the_length():
    tree = grow(config(segment__length=8), 3, prompt=6, align=4, eos=0.0)
    sizes = {(n.depth, len(n.tokens)) for n in tree.nodes[1:] if n.stop is None}
    assert sizes == {(1, 11), (2, 8), (3, 8), (4, 8), (5, 8)}


@pytest.mark.parametrize(
    "changes, block",
    [
        ({"segment__length": 64}, 32),
        ({"segment__length": 48}, 0),
        ({"segment__length": 48, "debug__segment_alignment": "kv_block"}, 32),
        ({"segment__length": 64, "debug__segment_alignment": "none"}, 0),
        ({"segment__length": 64, "segment__end": "newline"}, 0),
        ({"segment__length": 64, "mode": "sequential"}, 0),
    ],
)
def test_alignment_is_automatic_where_it_costs_one_stretched_segment(changes, block):
    assert config(max_response_len=256, **changes).alignment == block


@examples(60)
@given(st.integers(1, 8), st.sampled_from(["level", "quota"]), st.integers(0, 999))
def test_segments_end_at_borders_of_the_text_within_their_window(shortest, transfer, seed):
    cfg = config(segment__end=["b"], segment__min_length=shortest, branching__transfer=transfer)
    tree = grow(cfg, seed)
    assert len(tree.leaves) == 8 and cfg.depth_limit == math.ceil(48 / shortest)
    for node in tree.nodes[1:]:
        if node.stop is None:
            assert shortest <= len(node.tokens) <= 8
            assert node.tokens[-1] == BORDER or len(node.tokens) == 8
            assert BORDER not in node.tokens[shortest - 1 : -1], "the first border behind the shortest length"


def test_entropy_of_the_likeliest_tokens():
    assert top_k_entropy([math.log(0.25)] * 4) == pytest.approx(math.log(4))
    assert top_k_entropy([math.log(0.05)] * 4) == pytest.approx(math.log(4)), "renormalised"
    assert top_k_entropy([0.0, -1e9]) == 0.0
    with pytest.raises(ValueError, match="branch point"):
        top_k_entropy([])


@pytest.mark.parametrize("transfer", ["level", "quota"])
@pytest.mark.parametrize(
    "changes, favoured",
    [
        ({"branching__budget__kind": "entropy"}, 0),
        ({"branching__budget__kind": "low_prob", "branching__budget__signal": "branch_point"}, 0),
        ({"branching__budget__kind": "high_prob", "branching__budget__signal": "branch_point"}, 1),
    ],
)
def test_a_budget_at_the_branch_point_looks_at_the_next_token_not_at_the_segment(transfer, changes, favoured):
    cfg = config(n_samples_per_prompt=16, branching__transfer=transfer, branching__budget__temperature=0.1, **changes)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], str))
    while not search.done:
        for want in search.wants():
            sure = search.tree.nodes[want.node_id].path[0] == 1
            peek = ([-0.01, -5.0, -6.0] if sure else [-1.1, -1.1, -1.1])[: want.peek]
            tokens = sample(want, 0.0, False)
            search.take(want.node_id, Segment(tokens, [-1.0] * len(tokens), "length", peek))
    leaves = [sum(search.tree.nodes[i].path[0] == k for i in search.tree.leaves) for k in (0, 1)]
    assert sum(leaves) == 16 and leaves[favoured] >= 12, leaves


def test_nobody_peeks_behind_the_end_of_a_path():
    cfg = config(
        branching__budget__kind="entropy", branching__budget__top_k=5, max_response_len=16, n_samples_per_prompt=8
    )
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], str))
    first = search.wants()
    assert [w.peek for w in first] == [5, 5]
    for want in first:
        search.take(want.node_id, Segment([2] * 8, [-1.0] * 8, "length", [-1.0] * 5))
    assert [w.peek for w in search.wants()] == [0] * 4, "the last segment ends by length"
    assert search.tree.counts["peeked_tokens"] == 2


@examples(80)
@given(st.integers(8, 400), st.floats(0, 0.3), st.integers(0, 999))
def test_a_token_budget_buys_branches_and_finishes_what_lives(budget, eos, seed):
    cfg = config(token_budget=budget, n_samples_per_prompt=16)
    tree = grow(cfg, seed, eos=eos)
    spent = tree.counts["generated_tokens"]
    if len(tree.leaves) < 16:
        assert tree.shortfall is not None and f"token_budget {budget} is spent" in tree.shortfall
    # A branch is made only with a segment's worth left; each path may then go on to its full length.
    longest = max(len(tree.response(leaf)) for leaf in tree.leaves)
    assert spent <= budget + len(tree.leaves) * longest
    more = grow(cfg.model_copy(update={"token_budget": budget + 200}), seed, eos=eos)
    assert len(more.leaves) >= len(tree.leaves) or more.shortfall is None


def test_a_full_tree_costs_what_its_budget_says():
    wide = grow(config(n_samples_per_prompt=64, token_budget=400), 1, eos=0.0)
    none = grow(config(n_samples_per_prompt=64), 1, eos=0.0)
    assert len(none.leaves) == 64 and 2 < len(wide.leaves) < 64
    small = grow(config(n_samples_per_prompt=64, token_budget=8), 1, eos=0.0)
    assert len(small.leaves) == 1, "one segment's worth: one path, which is finished"


def test_the_budget_temperature_moves_over_the_run():
    r = config(
        branching__budget__kind="low_prob", branching__budget__temperature=5.0, branching__budget__temperature_end=1.0
    )
    assert [r.budget_temperature_at(x) for x in (0.0, 0.5, 1.0, 2.0)] == [5.0, 3.0, 1.0, 1.0]
    r = r.replace({"branching.budget.temperature_schedule": "cosine"})
    assert [round(r.budget_temperature_at(x), 3) for x in (0.0, 0.25, 0.5, 1.0)] == [5.0, 4.414, 3.0, 1.0]
    assert config(branching__budget__temperature=3.0).budget_temperature_at(0.7) == 3.0


def go_on(cfg: RolloutConfig, seed: int, order: random.Random, eos: float = 0.05) -> Tree:
    """Grow a tree by a driver that samples runs in one go and hands them over segment by segment."""
    stop = StopRules.from_config(cfg, [EOS], lambda tokens: "".join(chr(97 + t) for t in tokens))
    search = TreeSearch("p", [7] * 5, cfg, seed=seed, stop=stop)
    pending = [(w, []) for w in search.wants()]
    while pending:
        order.shuffle(pending)
        want, sampled = pending.pop()
        rest = sampled or sample(replace(want, max_tokens=max(want.run, want.max_tokens)), eos, False)
        piece = rest[: want.max_tokens]
        search.take(want.node_id, Segment(piece, [-1.0] * len(piece), "length"))
        for new in search.wants():
            ahead = rest[len(piece) :] if new.after == want.node_id and new.after is not None else []
            assert new.after is None or ahead, "a run goes on behind the segment that was delivered"
            pending.append((new, ahead))
    assert search.done
    return search.tree


@examples(80)
@given(
    st.sampled_from(["level", "quota"]), st.sampled_from(["equal", "low_prob"]), st.integers(1, 20), st.integers(0, 999)
)
def test_a_path_that_cannot_branch_is_sampled_in_one_go(transfer, budget, width, seed):
    """A run is one sample of the law that its segments are samples of, cut at the same borders, in any order."""
    cfg = config(branching__transfer=transfer, branching__budget__kind=budget, n_samples_per_prompt=width)
    tree, other = (go_on(cfg, seed, random.Random(k)) for k in (0, 1))
    assert tree == other and len(tree.leaves) == width
    for node in tree.nodes[1:]:
        assert node.stop is not None or len(node.tokens) == 8, "borders are where they always are"


def test_no_run_is_offered_where_segments_are_aligned_or_may_be_carried_over():
    assert config().continues and not config(segment__length=32).continues
    assert config(segment__length=32, debug__continue_paths="always").continues
    assert not config(debug__continue_paths="never").continues and not config(mode="sequential").continues
    assert not config(partial_rollout=16).continues


@pytest.mark.parametrize("transfer", ["level", "quota"])
def test_a_run_is_offered_from_where_the_tree_is_full_and_ends_with_the_path(transfer):
    cfg = config(branching__transfer=transfer, n_samples_per_prompt=4, max_response_len=32)
    search = TreeSearch("p", [7] * 5, cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], str))
    first = search.wants()
    assert [w.run for w in first] == [0, 0], "these will branch"
    for want in first:
        search.take(want.node_id, Segment([2] * 8, [-1.0] * 8, "length"))
    second = search.wants()
    assert [(w.run, w.after) for w in second] == [(24, None)] * 4
    search.take(second[0].node_id, Segment([2] * 8, [-1.0] * 8, "length"))
    (next_,) = search.wants()
    assert next_.after == second[0].node_id and next_.run == 16
    search.take(next_.node_id, Segment([3, EOS], [-1.0] * 2, "stop"))
    assert search.wants() == [], "the path has ended: nothing follows"
