"""Forks: where branches start when they start at uncertain tokens of ended paths, and what the trees are like."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.rollouts import rollout_config
from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.carry import CarriedTreeError
from treepo_mega.tree.credit import fold, leaf_weights
from treepo_mega.tree.descent import descent_shares, fair_leaves
from treepo_mega.tree.fork import decisions, first_crossings, followers, most_uncertain, open_forks
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.node_advantage import node_advantages
from treepo_mega.tree.search import Segment, TreeSearch, Want
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.stop import StopRules

EOS = 0
PROMPT = [7, 8]


def config(**changes: object) -> RolloutConfig:
    values = {
        "n_samples_per_prompt": 8,
        "segment__length": 6,
        "max_response_len": 24,
        "branching__at": "fork",
        "branching__fork__distance": 2,
    }
    return rollout_config(**{**values, **changes})


def entropy_before(prefix: list[int]) -> float:
    """How uncertain the fake model is about the next token: a function of what precedes it."""
    return random.Random(derive_seed("entropy", *prefix)).random()


def likeliest(prefix: list[int], count: int) -> list[tuple[int, float]]:
    """The fake model's next tokens, of ids 0 to 11: a function of what precedes them."""
    rng = random.Random(derive_seed("top", *prefix))
    weights = sorted((rng.random() for _ in range(12)), reverse=True)
    tokens = rng.sample(range(12), 12)
    return [(token, math.log(weight / sum(weights))) for token, weight in zip(tokens, weights, strict=True)][:count]


def sample(want: Want, eos: float) -> Segment:
    """Tokens as a function of the whole prefix and the seed; as many as the want takes in one request."""
    tokens: list[int] = []
    while len(tokens) < want.max_tokens and EOS not in tokens:
        rng = random.Random(derive_seed(want.seed, *want.prefix, -1, *tokens))
        tokens.append(EOS if rng.random() < eos else rng.randrange(1, 12))
    entropies = [entropy_before([*want.prefix, *tokens[:k]]) for k in range(len(tokens))] if want.entropy else []
    top = likeliest(want.prefix, want.top)
    return Segment(tokens, [-0.1 - token / 10 for token in tokens], "length", [], entropies, top)


def begin(cfg: RolloutConfig, seed: int) -> TreeSearch:
    return TreeSearch("p", PROMPT, cfg, seed=seed, stop=StopRules.from_config(cfg, [EOS], str), policy_version=1)


def run(search: TreeSearch, eos: float, order: random.Random | None = None) -> list[Want]:
    """Deliver all that may be sampled now, in any order; returns the wants."""
    pending = search.wants()
    seen = []
    while pending:
        if order is not None:
            order.shuffle(pending)
        want = pending.pop()
        seen.append(want)
        search.take(want.node_id, sample(want, eos))
        pending += search.wants()
    return seen


def grow(cfg: RolloutConfig, seed: int = 1, eos: float = 0.1, order: random.Random | None = None) -> Tree:
    search = begin(cfg, seed)
    run(search, eos, order)
    assert search.done
    return search.tree


configs = st.builds(
    config,
    n_samples_per_prompt=st.integers(1, 16),
    segment__length=st.integers(1, 24),
    branching__initial=st.none() | st.just((1, 3)),
    branching__factor=st.integers(2, 3),
    branching__fork__signal=st.just("entropy"),
    branching__fork__draw=st.sampled_from(["other", "again"]),
    branching__fork__top_k=st.sampled_from([1, 3, 12]),
    branching__fork__waves=st.integers(1, 4),
    branching__fork__distance=st.integers(1, 9),
    branching__fork__threshold=st.sampled_from([None, 0.5, 0.9]),
    segment__end=st.sampled_from(["length", "newline"]),
) | st.builds(
    config,
    n_samples_per_prompt=st.integers(1, 16),
    branching__fork__signal=st.just("logprob"),
    branching__fork__distance=st.integers(1, 9),
    branching__fork__draw=st.sampled_from(["other", "again"]),
)
rates = st.sampled_from([0.0, 0.05, 0.3, 1.0])
seeds = st.integers(0, 10**6)


@examples(150)
@given(configs, rates, seeds)
def test_a_tree_has_all_its_leaves_and_every_token_was_drawn_after_what_precedes_it(cfg, eos, seed):
    search = begin(cfg, seed)
    wants = run(search, eos)
    tree = search.tree
    assert len(tree.leaves) == len(set(tree.leaves)) == cfg.n_samples_per_prompt and tree.shortfall is None
    assert len({want.seed for want in wants}) == len(wants), "no two segments share a seed, though paths are renamed"
    trunks = len(tree.nodes[ROOT].children) - sum(tree.nodes[i].fork is not None for i in tree.nodes[ROOT].children)
    assert tree.counts["forks"] == cfg.n_samples_per_prompt - trunks
    signal = cfg.branching.fork.signal
    for node in tree.nodes[1:]:
        assert (node.id in tree.leaves) == (node.stop is not None) == (not node.children)
        assert node.parent < node.id and node.path == (*tree.nodes[node.parent].path, node.path[-1])
        assert 1 <= len(node.tokens) == len(node.logprobs) and len(node.entropies) in (0, len(node.tokens))
        assert len(node.entropies) == (len(node.tokens) if signal == "entropy" else 0)
        prefix = tree.prefix(node.parent)
        for place, found in enumerate(node.entropies):
            assert found == entropy_before([*prefix, *node.tokens[:place]])
        assert node.fork is None or node.path[-1] > 0 or node.parent == ROOT
    for leaf in tree.leaves:
        assert len(tree.response(leaf)) <= cfg.max_response_len and EOS not in tree.response(leaf)[:-1]


@examples(100)
@given(configs, rates, seeds, seeds)
def test_the_order_of_arrival_does_not_matter(cfg, eos, seed, order):
    assert grow(cfg, seed, eos) == grow(cfg, seed, eos, random.Random(order))


@examples(60)
@given(configs, rates, seeds)
def test_branch_points_keep_their_distance(cfg, eos, seed):
    tree = grow(cfg, seed, eos)
    for leaf in tree.leaves:
        places = [0]
        for node in tree.ancestry(leaf)[1:-1]:
            if len(tree.nodes[node].children) > 1:
                places.append(len(tree.response(node)))
        gaps = np.diff(places)
        assert all(gap >= cfg.branching.fork.distance for gap in gaps), places


@examples(40)
@given(configs, rates, seeds)
def test_what_comes_after_sees_a_tree_as_any_other(cfg, eos, seed):
    """Segments, credit per leaf and per node, shares and serialisation hold for cut segments."""
    tree = grow(cfg, seed, eos)
    rng = random.Random(seed)
    tree.rewards = [rng.random() for _ in tree.leaves]
    assert Tree.from_dict(json.loads(json.dumps(tree.to_dict()))) == tree
    segments = Segments.from_trees([tree], [0])
    flat = Segments.from_trees([tree], [0], "none")
    lengths = segments.flat_lengths()
    assert lengths.tolist() == [len(tree.response(leaf)) for leaf in tree.leaves] == flat.flat_lengths().tolist()
    advantages = np.array(tree.rewards) - np.mean(tree.rewards)
    weights = leaf_weights("token-mean", lengths)
    # A sum over (trajectory, token) pairs, on the tree and one path at a time.
    for one in (segments, flat):
        credit = fold(one, advantages, weights)
        total = float((credit.A_pos + credit.A_neg) @ np.where(one.trained, one.length, 0))
        assert total == pytest.approx(float(advantages @ lengths), abs=1e-9)
    assert len(node_advantages(tree, "segment")) == len(tree.nodes)
    assert math.fsum(descent_shares(tree)) == pytest.approx(1)


def test_trunks_run_to_their_ends_first_and_forks_come_in_waves():
    search = begin(config(n_samples_per_prompt=16, branching__fork__waves=3, branching__fork__draw="again"), 1)
    trunks = search.wants()
    assert len(trunks) == 4, "a quarter of the leaves"
    assert all(want.run == 24 and want.prefix == PROMPT for want in trunks), "to their ends, in one request each"
    waves = []
    pending = trunks
    while pending:
        waves.append(sum(want.after is None for want in pending))
        for want in pending:
            search.take(want.node_id, sample(want, 0.0))
        pending = search.wants()
        while pending and pending[0].after is not None:
            for want in pending:
                search.take(want.node_id, sample(want, 0.0))
            pending = search.wants()
    assert waves == [4, 4, 4, 4]
    assert search.tree.counts["forks"] == 12 and search.tree.counts["fork_uncertainty"] > 0


def test_the_most_uncertain_tokens_fork():
    """All tokens of two trunks are known: the choice is the largest entropies, wherever they are."""
    cfg = config(n_samples_per_prompt=4, branching__initial=(2, 2), branching__fork__waves=1, max_response_len=12)
    tree = grow(cfg, seed=3, eos=0.0)
    firsts = [leaf for leaf in tree.leaves if all(tree.nodes[n].fork is None for n in tree.ancestry(leaf))]
    ranked = sorted(
        {(entropy_before([*PROMPT, *tree.response(leaf)[:k]]), k) for leaf in firsts for k in range(2, 12)},
        reverse=True,
    )
    forks = [node for node in tree.nodes if node.fork]
    at = [len(tree.response(node.parent)) for node in forks]
    chosen = sorted((entropy_before(tree.prefix(node.parent)) for node in forks), reverse=True)
    assert len(forks) == 2 and {node.fork for node in forks} == {"rank"} and all(place >= 2 for place in at)
    assert chosen[0] == ranked[0][0] and chosen[1] in (ranked[1][0], ranked[2][0], ranked[3][0])
    assert tree.counts["fork_uncertainty"] == pytest.approx(sum(chosen))


def test_a_fork_draws_a_token_that_nobody_has_there():
    cfg = config(n_samples_per_prompt=16, branching__fork__top_k=3)
    counted = {"other": 0, "again": 0}
    for draw in counted:
        for seed in range(12):
            tree = grow(rollout_config(cfg, branching__fork__draw=draw), seed, eos=0.05)
            for parent in tree.nodes:
                firsts = [tree.nodes[child].tokens[0] for child in parent.children]
                law = dict(likeliest(tree.prefix(parent.id), 3))
                for child, token in zip(parent.children, firsts, strict=True):
                    node = tree.nodes[child]
                    if node.fork and draw == "other":
                        assert node.logprobs == [law[token]], "its probability under the policy, not among what is left"
                # Of three tokens that can be drawn and the one that was there, no more than four differ.
                counted[draw] += len(firsts) - len(set(firsts)) if len(firsts) <= 3 and parent.id else 0
    assert counted["other"] == 0 < counted["again"]


def test_branches_that_avoid_each_other_weigh_what_their_tokens_are_probable():
    """Given any first token, p f(first) + (1 - p) f(another) has the mean of f under the law as its expectation."""
    cfg = config(
        n_samples_per_prompt=9,
        branching__initial=(1, 1),
        branching__factor=3,
        branching__fork__threshold=0.2,
        branching__fork__draw="other",
        branching__fork__top_k=12,
        fallback__from="none",
    )
    seen = 0
    for seed in range(10):
        tree = grow(cfg, seed, eos=0.02)
        for parent in tree.nodes:
            children = [tree.nodes[child] for child in parent.children]
            if len(children) > 1:
                weights = [child.weight for child in children]
                assert sum(weights) == pytest.approx(1)
                assert weights[:-1] == [pytest.approx(math.exp(child.logprobs[0])) for child in children[:-1]]
                assert len({child.tokens[0] for child in children}) == len(children)
                seen += 1
        assert math.fsum(descent_shares(tree)) == pytest.approx(1)
    assert seen > 10


def test_a_fork_avoids_what_copies_of_its_path_drew():
    tree = chain(([0.1, 0.2, 0.9], 0), ([0.1, 0.2, 0.9], 0), tokens=[[1, 2, 3], [1, 2, 4]])
    assert followers(tree, ROOT) == {1}
    (fork,) = most_uncertain(tree, 1, signal="entropy", distance=1)
    assert (fork.node, fork.offset) == (1, 2)
    ((parent, _),) = open_forks(tree, [fork])
    assert followers(tree, parent) == {3, 4}


def test_a_place_counts_by_what_its_draws_leave_over():
    half, most = math.log(0.5), math.log(0.9)
    tree = chain(([0.5, 0.4], 0), ([0.5, 0.4], 0), tokens=[[1, 2], [1, 3]])
    tree.nodes[1].logprobs, tree.nodes[2].logprobs = [most, half], [most, math.log(0.3)]
    (fork,) = most_uncertain(tree, 1, signal="logprob", distance=1)
    assert (fork.node, fork.offset) == (1, 1)
    assert fork.uncertainty == pytest.approx(0.2), "token 1 after the prompt leaves 0.1, tokens 2 and 3 after it 0.2"
    assert places(tree, 3, distance=1) == [(1, 0, 2), (1, 1, 1)], "two tokens were drawn at either: 0.5 / 2, 0.4 / 2"


def chain(*parts: tuple[list[float], int], tokens: list[list[int]] | None = None) -> Tree:
    """A tree by hand: (entropies of a segment, its parent); without `tokens` no two segments begin alike."""
    tree = Tree.start("p", PROMPT)
    for entropies, parent in parts:
        node = tree.add_child(parent)
        node.entropies = entropies
        node.tokens = tokens[node.id - 1] if tokens else [100 * node.id + place for place in range(len(entropies))]
        node.logprobs = [-value for value in entropies]
    for node in tree.nodes[1:]:
        if not node.children:
            node.stop = "eos"
            tree.leaves.append(node.id)
    return tree


def places(tree: Tree, count: int, **keys: object) -> list[tuple[int, int, int]]:
    chosen = most_uncertain(tree, count, **{"signal": "entropy", "distance": 3, **keys})
    return [(fork.node, fork.offset, fork.branches) for fork in chosen]


def test_forks_near_one_another_are_one_and_a_used_point_counts_by_its_branches():
    tree = chain(([0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.6, 0.2], 0))
    assert places(tree, 1) == [(1, 3, 1)]
    assert places(tree, 2) == [(1, 3, 1), (1, 6, 1)], "0.8 and 0.7 are within three tokens of 0.9"
    assert places(tree, 3) == [(1, 3, 2), (1, 6, 1)], "0.9 / 2 is more than what is left"
    assert places(tree, 2, signal="logprob") == places(tree, 2), "the least probable tokens leave most over"
    assert places(chain(([0.0] * 6, 0), ([0.0] * 6, 0)), 3) == [(1, 0, 3)], "nothing is uncertain: from the prompt"


def test_distance_reaches_across_segments_and_branches():
    tree = chain(([0.1] * 4, 0), ([0.3, 0.1, 0.1, 0.5], 1), ([0.4, 0.9, 0.1, 0.1, 0.1], 1), ([0.2, 0.8, 0.1, 0.7], 2))
    # Segments 2 and 3 branch after segment 1: the first token of 2 stands for both, worth 0.3 / 2.
    assert places(tree, 1) == [(4, 1, 1)], "0.8; the 0.9 of segment 3 is one token after a branch point"
    # 0.7 and, across a border, 0.5 are within three tokens of it. What is left is 0.8 / 2, ... and 0.3 / 2.
    assert places(tree, 6) == [(4, 1, 5), (2, 0, 1)]


def test_what_ties_up_to_rounding_goes_to_the_first():
    tree = chain(([0.1, 0.2, 0.3, 0.9], 0), ([0.1, 0.2, 0.3, 0.9 + 1e-7], 0))
    assert places(tree, 1) == [(1, 3, 1)], "another batch may round an entropy otherwise"


def test_only_first_tokens_of_steps_fork_where_segments_are_steps():
    tree = chain(([0.1, 0.9, 0.9, 0.9, 0.9], 0), ([0.3, 0.9, 0.9], 1), ([0.2, 0.9], 2))
    assert places(tree, 2, borders_only=True) == [(2, 0, 1), (3, 0, 1)]


def test_cut_segments_keep_all_that_was_known_of_them():
    tree = chain(([0.1, 0.2, 0.3, 0.4], 0), ([0.5, 0.6], 1), ([0.7], 1))
    before = {tuple(tree.prefix(leaf)) for leaf in tree.leaves}
    tree.nodes[1].policy_version = 5
    forks = most_uncertain(tree, 1, signal="entropy", distance=1)
    (found,) = list(open_forks(tree, [replace(forks[0], node=1, offset=2)]))
    parent = tree.nodes[found[0]]
    assert (parent.tokens, parent.entropies, parent.path) == ([100, 101], [0.1, 0.2], (0,))
    (second,) = (tree.nodes[child] for child in parent.children)
    assert (second.tokens, second.logprobs, second.policy_version) == ([102, 103], [-0.3, -0.4], 5)
    assert [tree.nodes[i].path for i in second.children] == [(0, 0, 0), (0, 0, 1)]
    assert {tuple(tree.prefix(leaf)) for leaf in tree.leaves} == before
    with pytest.raises(ValueError, match="node 0 of 2 tokens cannot be cut before token 1"):
        tree.split(ROOT, 1)


def test_a_seed_is_named_by_decisions_and_not_by_cuts():
    tree = chain(([0.1, 0.2, 0.3, 0.4], 0), ([0.5, 0.6], 1), ([0.7], 1))
    leaf = tree.leaves[1]
    tokens = tree.prefix(leaf)
    assert decisions(tree, leaf) == [0, 0, 4, 1]
    tree.split(1, 3)
    tree.split(1, 1)
    tree.renumber()
    (leaf,) = (i for i in tree.leaves if tree.prefix(i) == tokens)
    assert decisions(tree, leaf) == [0, 0, 4, 1]


def test_a_threshold_forks_at_the_first_token_above_it():
    low, high = 0.1, 0.9
    tree = chain(([low, high, low, high, low, low, high, low], 0), ([low] * 8, 0))
    forks = first_crossings(tree, 8, threshold=0.5, factor=2, distance=3)
    assert [(fork.node, fork.offset, fork.branches) for fork in forks] == [(1, 3, 1), (1, 6, 1)]
    assert {fork.rule for fork in forks} == {"threshold"}
    for parent, _ in open_forks(tree, forks):
        node = tree.add_child(parent)
        node.fork = "threshold"
        node.tokens, node.logprobs, node.entropies, node.stop = [1, 2], [-1.0, -1.0], [high, low], "eos"
        tree.leaves.append(node.id)
    tree.renumber()
    assert first_crossings(tree, 8, threshold=0.5, factor=2, distance=3) == [], "the branches end too early to fork"
    assert sorted(descent_shares(tree)) == [0.125, 0.125, 0.25, 0.5], "trunk 2; the fork at token 3; the two at token 6"


def test_what_a_threshold_leaves_over_is_forked_by_rank_unless_fallback_is_off():
    rules = set()
    for seed in range(8):
        cfg = config(branching__fork__threshold=0.8, max_response_len=12, segment__length=12)
        tree = grow(cfg, seed, eos=0.05)
        rules |= {node.fork for node in tree.nodes}
        fair = grow(rollout_config(cfg, fallback__from="none"), seed, eos=0.05)
        assert len(tree.leaves) == 8 and {node.fork for node in fair.nodes} <= {None, "threshold"}
        assert len(fair_leaves(tree).leaves) == len(fair.leaves)
        if len(fair.leaves) < 8:
            assert f"{8 - len(fair.leaves)} of 8 leaves" in fair.shortfall
    assert rules == {None, "rank", "threshold"}


def test_a_token_budget_holds_forks_back():
    cfg = config(n_samples_per_prompt=16, token_budget=60, max_response_len=12)
    tree = grow(cfg, eos=0.0)
    assert tree.shortfall is not None and "token_budget 60 is spent" in tree.shortfall
    assert 4 < len(tree.leaves) < 16


@examples(40)
@given(st.integers(0, 999), st.integers(0, 99), st.sampled_from([None, 0.6]), st.sampled_from(["again", "other"]))
def test_a_tree_that_is_carried_over_is_the_tree_it_would_have_been(seed, order, threshold, draw):
    cfg = config(
        partial_rollout=8, branching__fork__threshold=threshold, branching__fork__draw=draw, branching__factor=3
    )
    search = begin(cfg, seed)
    run(search, 0.05, random.Random(order))
    steps = 1
    while not search.done:
        state = json.loads(json.dumps(search.state_dict()))
        search = begin(cfg, seed + 1)
        search.load_state_dict(state)
        steps += 1
        search.resume(steps, cfg)
        run(search, 0.05, random.Random(order))
    whole = grow(rollout_config(cfg, partial_rollout=1000), seed, 0.05)
    assert steps >= 3

    def told(tree: Tree) -> list[object]:
        return [[replace(node, policy_version=0) for node in tree.nodes], tree.leaves, tree.counts]

    assert told(search.tree) == told(whole)


def test_a_tree_of_another_rule_is_not_gone_on_with():
    search = begin(config(partial_rollout=8), 1)
    run(search, 0.0)
    other = begin(config(partial_rollout=8, branching__at="border"), 1)
    with pytest.raises(CarriedTreeError, match=r"under another rollout.branching.at \(fork\) than 'level'"):
        other.load_state_dict(search.state_dict())


def test_entropies_that_were_not_wanted_or_are_missing_are_refused():
    search = begin(config(), 1)
    (want, _) = search.wants()
    segment = sample(want, 0.0)
    assert want.entropy == 10
    with pytest.raises(ValueError, match="wanted 6 entropies, got 5"):
        search.take(want.node_id, replace(segment, entropies=segment.entropies[1:]))
    free = begin(config(branching__fork__signal="logprob"), 1)
    (want, _) = free.wants()
    with pytest.raises(ValueError, match="wanted 0 entropies, got 6"):
        free.take(want.node_id, segment)
