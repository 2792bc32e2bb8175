"""The sampler as a state machine, driven by pure fake samplers over random stop patterns and budgets.

The main oracle is a sampler whose tokens are a hash of the whole prefix it was given (and of the seed): if a path's
recorded tokens are not what the sampler was conditioned on, also after a fallback, the hashes cannot agree.
"""

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
from treepo_mega.tree.fallback import CANDIDATES
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.search import Segment, TreeSearch, Want
from treepo_mega.tree.stop import STOP_REASONS, StopRules

SYMBOLS = ["<eos>", "\\boxed{", "}", *"abcdefghijklmnopqrstuvwxyz0123456789"]
EOS, BOX, CLOSE = 0, 1, 2


def decode(tokens: list[int]) -> str:
    return "".join(SYMBOLS[t] for t in tokens)


def sample(prefix: list[int], seed: int, max_tokens: int, eos: float, box: float) -> list[int]:
    """A pure sampler: every token is a function of the whole prefix before it and the seed."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        rng = random.Random(derive_seed(seed, *prefix, -1, *tokens))
        tokens.append(rng.randrange(3, len(SYMBOLS)))
        draw = rng.random()
        if draw < eos:
            tokens[-1] = EOS
            break
        if draw < eos + box:
            tokens = [*tokens, BOX, 5, CLOSE][:max_tokens]
    return tokens


def config(**changes: object) -> RolloutConfig:
    values = {"n_samples_per_prompt": 8, "segment__length": 4, "max_response_len": 20, "branching__factor": 2}
    return rollout_config(**{**values, **changes})


def grow(
    cfg: RolloutConfig, *, seed: int = 1, eos: float = 0.1, box: float = 0.0, order: random.Random | None = None
) -> Tree:
    """Grow one tree; `order` shuffles the arrival of segments and delivers some before others are asked for."""
    search = TreeSearch("p", [7, 8, 9], cfg, seed=seed, stop=StopRules.from_config(cfg, [EOS], decode))
    pending: list[Want] = []
    while not search.done:
        pending += search.wants()
        if order is not None:
            order.shuffle(pending)
        want = pending.pop()
        tokens = sample(want.prefix, want.seed, want.max_tokens, eos, box)
        # Logprobs are a function of the tokens, so that what a budget makes of them is one of the tree.
        peek = [-((tokens[-1] + k) % 7) / 3 for k in range(want.peek)]
        search.take(want.node_id, Segment(tokens, [-t / 10 for t in tokens], "length", peek))
    assert not pending and not search.wants()
    return search.tree


configs = st.builds(
    config,
    n_samples_per_prompt=st.integers(1, 20),
    segment__length=st.integers(1, 8),
    max_response_len=st.integers(1, 24),
    branching__factor=st.integers(1, 4),
    branching__initial=st.none() | st.tuples(st.integers(1, 3), st.integers(3, 9)),
    fallback__from=st.sampled_from(["finished", "any", "longest", "none"]),
    mode=st.sampled_from(["tree", "sequential"]),
    branching__transfer=st.sampled_from(["level", "quota"]),
    fallback__cut=st.sampled_from(["random", "low_prob"]),
    branching__budget__kind=st.sampled_from(["equal", "low_prob", "high_prob", "entropy"]),
    branching__budget__signal=st.sampled_from(["segment", "branch_point"]),
    branching__budget__temperature=st.sampled_from([0.01, 2.0]),
    branching__budget__scale=st.sampled_from(["auto", "nats", "share", "rank", "zscore"]),
    branching__budget__floor=st.sampled_from([None, None, 0.5, 1.0]),
)
rates = st.sampled_from([(0.0, 0.0), (0.05, 0.0), (0.3, 0.0), (0.9, 0.0), (0.05, 0.1), (0.0, 0.4), (1.0, 0.0)])


@examples(150)
@given(configs, rates, st.integers(0, 10**6))
def test_exactly_w_leaves_or_a_recorded_reason(cfg, rate, seed):
    tree = grow(cfg, seed=seed, eos=rate[0], box=rate[1])
    if tree.shortfall is None:
        assert len(tree.leaves) == cfg.n_samples_per_prompt
    else:
        assert cfg.fallback.from_ == "none" and len(tree.leaves) < cfg.n_samples_per_prompt
        assert f"{cfg.n_samples_per_prompt - len(tree.leaves)} of {cfg.n_samples_per_prompt}" in tree.shortfall
    assert len(set(tree.leaves)) == len(tree.leaves)
    seeds = {derive_seed(seed, *node.path) for node in tree.nodes}
    assert len(seeds) == len(tree.nodes), "no two siblings, nor any two nodes, are the same by construction"
    for node in tree.nodes[1:]:
        is_leaf = node.id in tree.leaves
        assert is_leaf == (node.stop in STOP_REASONS) == (not node.children)
        assert 1 <= len(node.tokens) <= cfg.segment_tokens and len(node.tokens) == len(node.logprobs)
        assert node.depth <= cfg.depth_limit and node.parent < node.id
    for leaf in tree.leaves:
        response = tree.response(leaf)
        assert len(response) <= cfg.max_response_len
        assert EOS not in response[:-1], "nothing behind EOS is kept"


@examples(100)
@given(configs, rates, st.integers(0, 10**6))
def test_every_segment_is_what_its_own_path_was_conditioned_on(cfg, rate, seed):
    tree = grow(cfg, seed=seed, eos=rate[0], box=rate[1])
    for node in tree.nodes[1:]:
        prefix = tree.prefix(node.parent)
        room = min(cfg.segment_tokens, cfg.max_response_len - (len(prefix) - 3))
        again = sample(prefix, derive_seed(seed, *node.path), room, *rate)
        assert node.tokens == again[: len(node.tokens)]
        assert node.stop is not None or node.tokens == again


@examples(100)
@given(configs, rates, st.integers(0, 10**6), st.integers(0, 10**6))
def test_arrival_order_does_not_matter(cfg, rate, seed, order):
    one = grow(cfg, seed=seed, eos=rate[0], box=rate[1])
    other = grow(cfg, seed=seed, eos=rate[0], box=rate[1], order=random.Random(order))
    assert one == other


def test_another_seed_is_another_tree_and_the_same_seed_the_same():
    assert grow(config(), seed=1) == grow(config(), seed=1)
    assert grow(config(), seed=1).nodes != grow(config(), seed=2).nodes


def test_a_full_binary_tree_doubles_until_the_width_and_then_only_grows_longer():
    tree = grow(config(n_samples_per_prompt=8), eos=0.0)
    assert [sum(n.depth == d for n in tree.nodes) for d in range(6)] == [1, 2, 4, 8, 8, 8]
    assert {tree.nodes[i].stop for i in tree.leaves} == {"length"}
    assert tree.counts["fallbacks"] == 0 and tree.counts["levels"] == 5
    assert tree.unique_tokens() / tree.flat_tokens() == (2 + 4 + 8 * 3) / (8 * 5)


def test_the_branches_of_a_stopped_path_go_to_its_siblings():
    cfg = config(n_samples_per_prompt=8)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    first, second = search.wants()
    search.take(first.node_id, Segment([EOS], [-1.0], "stop"))
    assert search.wants() == [], "the level is incomplete"
    search.take(second.node_id, Segment([4, 5, 6, 7], [-1.0] * 4, "length"))
    assert len(search.wants()) == 4, "max(1, min(8 - 1, 2 * (1 + 1)))"


def test_under_quota_children_start_when_their_parent_ends_and_share_its_quota():
    cfg = config(n_samples_per_prompt=8, branching__transfer="quota")
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    first, second = search.wants()
    search.take(second.node_id, Segment([4, 5, 6, 7], [-1.0] * 4, "length"))
    assert [w.prefix for w in search.wants()] == [[7, 4, 5, 6, 7]] * 2, "nobody waits for the other path"
    search.take(first.node_id, Segment([EOS], [-1.0], "stop"))
    assert search.wants() == [] and not search.done, "what the stopped path leaves over goes to fallback"


def test_under_quota_a_full_tree_is_the_one_that_levels_give():
    cfg = config(n_samples_per_prompt=16)
    assert grow(config(n_samples_per_prompt=16, branching__transfer="quota"), eos=0.0).to_dict() | {
        "counts": 0
    } == grow(cfg, eos=0.0).to_dict() | {"counts": 0}


def test_under_quota_fallback_spends_exactly_what_stopped_paths_left_over():
    cfg = config(n_samples_per_prompt=9, branching__transfer="quota", branching__factor=3, max_response_len=40)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    for want in search.wants():
        search.take(want.node_id, Segment([5, EOS], [-1.0] * 2, "stop"))
    again = search.wants()
    assert len(search.tree.leaves) == 3 and len(again) == 6
    assert all(w.prefix == [7] for w in again) and len({w.seed for w in again}) == 6
    none = grow(config(n_samples_per_prompt=9, branching__transfer="quota", fallback__from="none"), eos=0.4)
    assert none.shortfall is not None and f"{9 - len(none.leaves)} of 9" in none.shortfall


def test_under_quota_one_candidate_takes_all_that_is_left():
    cfg = config(n_samples_per_prompt=9, branching__transfer="quota", fallback__from="finished")
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    one, other = search.wants()
    search.take(one.node_id, Segment([5, EOS], [-1.0] * 2, "stop"))
    search.take(other.node_id, Segment([BOX, 5, CLOSE, EOS], [-1.0] * 4, "stop"))
    assert len(search.wants()) == 4, "two candidates, branch_factor children each, seven leaves to come"
    while not search.done:
        node = next(iter(search._running))
        search.take(node, Segment([6, 7, 8, 9][: search._running[node]], [-1.0] * search._running[node], "length"))
    assert len(search.tree.leaves) == 9 and search.tree.shortfall is None


@pytest.mark.parametrize("transfer", ["level", "quota"])
@pytest.mark.parametrize("budget, favoured", [("low_prob", 0), ("high_prob", 1)])
def test_a_weighted_budget_gives_more_leaves_to_unsure_or_to_sure_paths(transfer, budget, favoured):
    cfg = config(
        n_samples_per_prompt=16,
        branching__transfer=transfer,
        branching__budget__kind=budget,
        branching__budget__temperature=0.1,
    )
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    while not search.done:
        for want in search.wants():
            tokens = sample(want.prefix, want.seed, want.max_tokens, 0.0, 0.0)
            sure = search.tree.nodes[want.node_id].path[0] == 1
            search.take(want.node_id, Segment(tokens, [-0.1 if sure else -3.0] * len(tokens), "length"))
    leaves = [sum(search.tree.nodes[i].path[0] == k for i in search.tree.leaves) for k in (0, 1)]
    assert sum(leaves) == 16 and leaves[favoured] >= 12, leaves


@pytest.mark.parametrize("transfer", ["level", "quota"])
@pytest.mark.parametrize(
    "budget",
    [
        {"kind": "low_prob", "scale": "nats", "temperature": 0.05},
        *({"kind": kind, "scale": scale} for kind in ("low_prob", "entropy") for scale in ("share", "rank", "zscore")),
        *({"kind": "high_prob", "scale": scale} for scale in ("rank", "zscore")),
        {"kind": "high_prob", "scale": "share"},
        {"kind": "high_prob", "scale": "nats", "temperature": 0.05},
        {"kind": "entropy", "scale": "nats", "temperature": 0.05},
        {"kind": "entropy", "floor": 0.5},
        {"kind": "entropy", "scale": "nats", "temperature": 100.0, "floor": 0.5},
    ],
    ids=lambda budget: "-".join(map(str, budget.values())),
)
def test_every_budget_changes_a_binary_tree_of_16_leaves(budget, transfer):
    """Entropies as a trained model has them: 0.07 nats at most borders, now and then a decision."""
    changes = {f"branching__budget__{key}": value for key, value in budget.items()}

    def grown(**more: object) -> Tree:
        cfg = config(n_samples_per_prompt=16, max_response_len=24, branching__transfer=transfer, **more)
        search = TreeSearch("p", [7], cfg, seed=4, stop=StopRules.from_config(cfg, [EOS], decode))
        while not search.done:
            for want in search.wants():
                tokens = sample(want.prefix, want.seed, want.max_tokens, 0.0, 0.0)
                # No two borders alike: paths that tie share alike.
                place = random.Random(want.seed).random()
                decided = place < 2 / 3
                chance = 0.99 + place / 100 if decided else place / 2
                peek = [math.log(chance), *[math.log((1 - chance) / 9)] * 9][: want.peek]
                logprobs = [-place / 100 if decided else -5 * place] * len(tokens)
                search.take(want.node_id, Segment(tokens, logprobs, "length", peek))
        return search.tree

    equal = grown()
    tree = grown(**changes)
    assert len(tree.leaves) == 16 and tree.shortfall is None
    assert equal.counts["budget_divergence"] == 0.0
    assert (
        tree.counts["budget_decisions"] > 0 and tree.counts["budget_divergence"] / tree.counts["budget_decisions"] > 0
    )
    assert [node.path for node in tree.nodes] != [node.path for node in equal.nodes]


def test_under_the_floor_no_path_branches_and_its_branches_are_there_at_the_next_level():
    cfg = config(
        n_samples_per_prompt=16,
        branching__budget__kind="entropy",
        branching__budget__scale="nats",
        branching__budget__floor=0.5,
    )
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    sure, torn = [0.0, -20.0], [-0.7, -0.7]
    widths = []
    for peek in (sure, sure, torn):
        level = search.wants()
        widths.append(len(level))
        for want in level:
            search.take(want.node_id, Segment([4, 5, 6, 7], [-1.0] * 4, "length", peek))
    assert widths == [2, 2, 2] and len(search.wants()) == 2 * 2 + 2 + 2, "two levels have kept two branches each"


def test_under_quota_the_floor_keeps_a_quota_whole():
    cfg = config(
        n_samples_per_prompt=8,
        branching__transfer="quota",
        branching__budget__kind="entropy",
        branching__budget__scale="nats",
        branching__budget__temperature=100.0,
        branching__budget__floor=0.5,
    )
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    first, second = search.wants()
    search.take(first.node_id, Segment([4, 5, 6, 7], [-1.0] * 4, "length", [-0.01, -4.6]))
    search.take(second.node_id, Segment([4, 5, 6, 8], [-1.0] * 4, "length", [-0.7, -0.7]))
    wants = search.wants()
    assert [want.prefix[-1] for want in wants] == [7, 8, 8]
    search.take(wants[0].node_id, Segment([4, 5, 6, 9], [-1.0] * 4, "length", [-0.7, -0.7]))
    assert [want.prefix[-1] for want in search.wants()] == [9, 9], "a border where it is torn: its leaves come now"


def test_under_quota_a_weighted_family_waits_for_itself_and_gives_stopped_members_no_more_than_their_leaf():
    cfg = config(
        n_samples_per_prompt=9,
        branching__factor=3,
        branching__transfer="quota",
        branching__budget__kind="low_prob",
        max_response_len=40,
    )
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    a, b, c = search.wants()
    long = Segment([4, 5, 6, 7], [-1.0] * 4, "length")
    search.take(c.node_id, long)
    search.take(a.node_id, Segment([EOS], [-1.0], "stop"))
    assert search.wants() == [], "the family is incomplete"
    search.take(b.node_id, long)
    assert len(search.wants()) == 6, "eight leaves over two living members, four each, at most three children each"
    assert sorted(f.quota for f in {id(f): f for f in search._transfer._family.values()}.values()) == [4, 4]


def test_under_quota_a_weighted_family_with_nothing_to_allot_does_not_wait():
    cfg = config(n_samples_per_prompt=2, branching__transfer="quota", branching__budget__kind="low_prob")
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    first, _ = search.wants()
    search.take(first.node_id, Segment([4, 5, 6, 7], [-1.0] * 4, "length"))
    assert len(search.wants()) == 1


def test_initial_branches_are_drawn_per_tree_within_the_range_and_the_width():
    widths = {len(grow(config(branching__initial=(2, 6)), seed=s).nodes[ROOT].children) for s in range(60)}
    assert widths == {2, 3, 4, 5, 6}
    assert len(grow(config(n_samples_per_prompt=3, branching__initial=(5, 6)), eos=0.0).nodes[ROOT].children) == 3


def test_fallback_fills_the_tree_from_borders_of_ended_paths():
    tree = grow(config(n_samples_per_prompt=16), eos=0.25, seed=3)
    again = [n for n in tree.nodes if n.fallback]
    assert again and len(again) == tree.counts["fallbacks"]
    for node in again:
        others = [c for c in tree.nodes[node.parent].children if c != node.id]
        assert others, "it joins earlier children of the node it falls back to"
    assert any(tree.nodes[n.parent].depth > 0 for n in again), "cuts are not always at the prompt"


def test_fallback_without_a_finished_path_starts_over_from_the_prompt():
    cfg = config(n_samples_per_prompt=5, segment__length=4, max_response_len=4)
    tree = grow(cfg, eos=0.0)
    assert {tree.nodes[i].stop for i in tree.leaves} == {"length"}
    assert len(tree.nodes[ROOT].children) == 5 and tree.counts["fallbacks"] == 3


def test_which_ended_paths_are_resampled_first():
    tree = Tree.start("p", [7])
    for tokens, stop in (([4], "eos"), ([4, 5, 6], "length"), ([4, 5], "answer"), ([4, 5], "repetition")):
        node = tree.add_child(ROOT)
        node.tokens, node.stop = tokens, stop
        tree.leaves.append(node.id)
    orders = {name: {tuple(pick(tree, random.Random(s))) for s in range(50)} for name, pick in CANDIDATES.items()}
    assert orders["finished"] == {(1, 3), (3, 1)}
    assert {frozenset(o) for o in orders["any"]} == {frozenset((1, 2, 3, 4))} and len(orders["any"]) > 10
    assert orders["longest"] == {(2, 3, 4, 1), (2, 4, 3, 1)}


@pytest.mark.parametrize("weak, prefix", [(0, [7]), (1, [7, 4, 5, 6, 8]), (2, [7, 4, 5, 6, 8, 4, 5, 6, 8])])
def test_a_low_prob_cut_is_the_border_behind_which_the_path_was_least_sure(weak, prefix):
    cfg = config(n_samples_per_prompt=2, branching__factor=1, fallback__cut="low_prob")
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    for depth in range(3):
        (want,) = search.wants()
        first = -4.0 if depth == weak else -1.0  # later tokens are less probable still, but are not at a border
        tokens, reason = ([4, 5, 6, 8], "length") if depth < 2 else ([4, 5, 6, EOS], "stop")
        search.take(want.node_id, Segment(tokens, [first, -9.0, -9.0, -9.0], reason))
    (again,) = search.wants()
    assert again.prefix == prefix and search.tree.nodes[again.node_id].fallback


def test_a_low_prob_cut_among_equals_is_the_earliest():
    cfg = config(n_samples_per_prompt=2, branching__factor=1, fallback__cut="low_prob", max_response_len=8)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    for tokens in ([4, 5, 6, 8], [4, 5, 6, EOS]):
        (want,) = search.wants()
        search.take(want.node_id, Segment(tokens, [-1.0] * 4, "length"))
    assert [w.prefix for w in search.wants()] == [[7]]


def test_sequential_mode_is_n_children_of_the_root_with_the_whole_response():
    cfg = config(mode="sequential", n_samples_per_prompt=6)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    wants = search.wants()
    assert [w.max_tokens for w in wants] == [20] * 6 and len({w.seed for w in wants}) == 6
    tree = grow(cfg, eos=0.2)
    assert tree.nodes[ROOT].children == tree.leaves == [1, 2, 3, 4, 5, 6]


def test_tokens_behind_an_answer_are_dropped_and_counted():
    cfg = config(mode="sequential", n_samples_per_prompt=1)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    search.take(1, Segment([BOX, 5, CLOSE, 6, 7, EOS], [-1.0] * 6, "stop"))
    tree = search.tree
    assert search.done and tree.nodes[1].tokens == [BOX, 5, CLOSE] and tree.nodes[1].stop == "answer"
    assert (tree.counts["generated_tokens"], tree.counts["dropped_tokens"]) == (6, 3)


def test_duplicates_are_counted():
    cfg = config(mode="sequential", n_samples_per_prompt=3)
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    for want in search.wants():
        search.take(want.node_id, Segment([5, EOS], [-1.0] * 2, "stop"))
    assert search.tree.counts["duplicates"] == 2


def test_a_drivers_mistakes_are_named():
    cfg = config()
    search = TreeSearch("p", [7], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
    first = search.wants()[0]
    good = Segment([4, 5, 6, 7], [-1.0] * 4, "length")
    with pytest.raises(ValueError, match="no segment is wanted"):
        search.take(99, good)
    with pytest.raises(ValueError, match="wanted 1 to 4 tokens, got 5"):
        search.take(first.node_id, replace(good, tokens=[4] * 5, logprobs=[-1.0] * 5))
    with pytest.raises(ValueError, match="wanted 1 to 4 tokens, got 0"):
        search.take(first.node_id, Segment([], [], "abort"))
    with pytest.raises(ValueError, match="logprobs"):
        search.take(first.node_id, replace(good, logprobs=[]))
    search.take(first.node_id, good)
    with pytest.raises(ValueError, match="already delivered"):
        search.take(first.node_id, good)
    with pytest.raises(ValueError, match="no tokens"):
        TreeSearch("p", [], cfg, seed=0, stop=StopRules.from_config(cfg, [EOS], decode))
