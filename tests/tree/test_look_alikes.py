"""Branches that repeat a sibling are cut, and their draws are counted: in any order, with all leaves, without bias."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.rollouts import rollout_config
from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.credit import leaf_weights
from treepo_mega.tree.descent import descent_shares, fair_leaves
from treepo_mega.tree.look_alikes import LOOK_ALIKE
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.node_advantage import node_advantages
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

EOS = 0


def config(**changes: object) -> RolloutConfig:
    values = {
        "segment__length": 2,
        "max_response_len": 12,
        "n_samples_per_prompt": 8,
        "branching__look_alikes": "cut",
    }
    return rollout_config(**{**values, **changes})


def start(cfg: RolloutConfig, seed: int) -> TreeSearch:
    return TreeSearch("p", [7, 8], cfg, seed=seed, stop=StopRules.from_config(cfg, [EOS], str))


def run(search: TreeSearch, order: random.Random, symbols: int = 3) -> None:
    """Deliver all that is wanted in this step, in any order; few symbols, so that siblings are often alike."""
    pending = search.wants()
    while pending:
        order.shuffle(pending)
        want = pending.pop()
        rng = random.Random(derive_seed(want.seed, *want.prefix))
        tokens = [rng.randrange(symbols) for _ in range(want.max_tokens)]
        tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        peek = [-rng.random() for _ in range(want.peek)]
        search.take(want.node_id, Segment(tokens, [-rng.random() for _ in tokens], "length", peek))
        pending += search.wants()


def grow(cfg: RolloutConfig, seed: int, order: int = 0, symbols: int = 3) -> Tree:
    search = start(cfg, seed)
    run(search, random.Random(order), symbols)
    assert search.done
    return search.tree


configs = st.builds(
    config,
    branching__factor=st.integers(2, 3),
    branching__initial=st.sampled_from([None, (8, 8)]),
    branching__transfer=st.sampled_from(["level", "quota"]),
    branching__budget__kind=st.sampled_from(["equal", "entropy"]),
    branching__look_alike_tokens=st.sampled_from([None, 1]),
    debug__continue_paths=st.sampled_from(["never", "always"]),
)


@examples(100)
@given(configs, st.integers(0, 9999), st.integers(0, 99))
def test_no_branch_repeats_one_that_began_with_it_and_the_tree_has_all_its_leaves(cfg, seed, order):
    tree = grow(cfg, seed)
    assert tree == grow(cfg, seed, order), "in any order of arrival"
    assert len(tree.leaves) == 8 and tree.shortfall is None
    cut = [node for node in tree.nodes if node.stop == LOOK_ALIKE]
    assert len(cut) == tree.counts["look_alikes"]
    assert sum(len(node.tokens) for node in cut) == tree.counts["look_alike_tokens"]
    assert not any(node.children or node.id in tree.leaves for node in cut)
    for parent in tree.nodes:
        began = [tree.nodes[child] for child in parent.children if not tree.nodes[child].fallback]
        kept = [node for node in began if node.stop != LOOK_ALIKE]
        seen = [tuple(node.tokens[: cfg.branching.look_alike_tokens]) for node in kept]
        assert len(set(seen)) == len(seen)
        assert sum(node.weight for node in kept) == len(began), "every draw is counted once"


def test_a_model_without_a_choice_still_ends():
    tree = grow(config(n_samples_per_prompt=5), 1, symbols=1)
    assert len(tree.leaves) == 5 and tree.counts["look_alikes"] == 1 and tree.nodes[1].weight == 2


@pytest.mark.parametrize("kind", ["equal", "entropy"])
def test_a_full_tree_that_loses_branches_decides_again(kind):
    """Six of six alike: one goes on alone; two branches of it must then share five leaves, by what comes next."""
    cfg = config(
        n_samples_per_prompt=6,
        branching__initial=(6, 6),
        branching__budget__kind=kind,
        fallback__from="any",
        segment__length=1,
        max_response_len=9,
    )
    tree = grow(cfg, 0, symbols=1000)
    assert len(tree.leaves) == 6 and tree.counts["look_alikes"] == 0
    search = start(cfg, 1)
    first = True
    while not search.done:
        for want in search.wants():
            token = 4 if first else derive_seed(want.seed) % 1000 + 1
            search.take(want.node_id, Segment([token], [-1.0], "length", [-0.7, -0.7][: want.peek]))
        first = False
    assert len(search.tree.leaves) == 6 and search.tree.counts["look_alikes"] == 5


def test_its_leaves_grow_elsewhere_by_the_rule():
    search = start(config(), 0)
    first, second = search.wants()
    search.take(second.node_id, Segment([4, 5], [-1.0] * 2, "length"))
    assert search.wants() == [], "it waits for its sibling"
    search.take(first.node_id, Segment([4, 5], [-1.0] * 2, "length"))
    wants = search.wants()
    assert [want.prefix for want in wants] == [[7, 8, 4, 5]] * 4, "max(1, min(8, 2 * (1 + 1))), all below the first"


def test_under_quota_the_others_of_a_family_share_what_it_leaves():
    cfg = config(branching__factor=3, branching__transfer="quota", branching__budget__kind="low_prob")
    search = start(cfg, 0)
    for want, tokens in zip(search.wants(), ([4, 5], [4, 5], [6, 5]), strict=True):
        search.take(want.node_id, Segment(tokens, [-1.0] * 2, "length"))
    assert sorted(want.prefix[2] for want in search.wants()) == [4, 4, 4, 6, 6, 6]
    assert sum(family.quota for family in {id(f): f for f in search._transfer._family.values()}.values()) == 8


@examples(30)
@given(st.sampled_from(["level", "quota"]), st.integers(0, 999), st.integers(0, 99))
def test_a_carried_tree_waits_for_the_same_siblings(transfer, seed, order):
    cfg = config(branching__transfer=transfer, partial_rollout=4)
    search = start(cfg, seed)
    run(search, random.Random(order))
    while not search.done:
        written = json.dumps(search.state_dict())
        search = start(cfg, seed + 1)
        search.load_state_dict(json.loads(written))
        search.resume(1, cfg)
        run(search, random.Random(order))
    whole = grow(config(branching__transfer=transfer, partial_rollout=1000), seed)
    assert [(n.path, n.tokens, n.weight, n.stop) for n in search.tree.nodes] == [
        (n.path, n.tokens, n.weight, n.stop) for n in whole.nodes
    ]
    assert search.tree.counts == whole.counts


def test_independent_samples_are_not_cut():
    tree = grow(config(mode="sequential"), 1, symbols=1)
    assert tree.counts["look_alikes"] == 0 and len(tree.leaves) == 8


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_weights_count_as_if_the_sibling_had_been_kept_and_had_gone_on_alike(mode):
    """Packed with weights equals flat with each leaf as often as its draws were made, to 1e-10."""
    tree = Tree.start("p", [1])

    def child(parent: int, size: int) -> int:
        node = tree.add_child(parent)
        node.tokens = [5] * size
        return node.id

    twice = child(ROOT, 3)
    tree.nodes[twice].weight = 2
    gone = child(ROOT, 3)
    tree.nodes[gone].stop = LOOK_ALIKE
    once = child(ROOT, 2)
    tree.leaves = [child(twice, 1), child(twice, 4), once]
    sizes = [4, 7, 2]
    assert descent_shares(tree) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    weights = leaf_weights(mode, np.array(sizes), counts=np.array(descent_shares(tree)))
    # Flat: the branch and its copy both have two leaves of 1/6, the third child 1/3: 1, 1, 1, 1 and 2 draws of six.
    flat = leaf_weights(mode, np.array([4, 7, 4, 7, 2, 2]))
    packed_loss = (weights * sizes * [0.3, -0.7, 1.1]).sum() / sum(sizes)
    flat_loss = (flat * [4, 7, 4, 7, 2, 2] * [0.3, -0.7, 0.3, -0.7, 1.1, 1.1]).sum() / sum([4, 7, 4, 7, 2, 2])
    assert math.isclose(packed_loss, flat_loss, rel_tol=1e-10)


def test_leave_one_out_leaves_out_one_of_the_draws():
    """A branch that stands for two has the advantage of either of two siblings that said the same."""

    def tree_with(branches: list[tuple[int, list[float]]]) -> Tree:
        tree = Tree.start("p", [1])
        for weight, rewards in branches:
            node = tree.add_child(ROOT)
            node.weight = weight
            tree.leaves += [tree.add_child(node.id).id for _ in rewards]
            tree.rewards += rewards
        return tree

    cut = tree_with([(2, [1.0, 0.0]), (1, [0.5]), (1, [0.2, 0.1, 0.6])])
    flat = tree_with([(1, [1.0, 0.0]), (1, [1.0, 0.0]), (1, [0.5]), (1, [0.2, 0.1, 0.6])])
    of_cut = node_advantages(cut, "rloo", shares=descent_shares(cut))
    of_flat = node_advantages(flat, "rloo", shares=descent_shares(flat))
    assert of_cut[1] == pytest.approx(of_flat[1]) and of_cut[4] == pytest.approx(of_flat[7])


def test_descents_of_cut_trees_have_the_policys_mean():
    """Tokens 1 and 2 alike, EOS with 0.6: shares give the policy's mean length, leaves counted alike do not."""
    cfg = config(segment__length=1, max_response_len=4, fallback__from="none", n_samples_per_prompt=4)
    expected = sum(length * (0.4 ** (length - 1)) * (0.6 if length < 4 else 1.0) for length in range(1, 5))
    fair, alike = [], []
    for seed in range(1500):
        search = start(cfg, seed)
        while not search.done:
            for want in search.wants():
                draw = random.Random(derive_seed(want.seed)).random()
                token = EOS if draw < 0.6 else 1 + (draw < 0.8)
                search.take(want.node_id, Segment([token], [-1.0], "length"))
        tree = fair_leaves(search.tree)
        lengths = [len(tree.response(leaf)) for leaf in tree.leaves]
        fair.append(sum(share * length for share, length in zip(descent_shares(tree), lengths, strict=True)))
        alike.append(sum(lengths) / len(lengths))
    error = (sum((value - expected) ** 2 for value in fair) / len(fair)) ** 0.5 / len(fair) ** 0.5
    assert abs(sum(fair) / len(fair) - expected) < 3 * error
    assert sum(alike) / len(alike) - expected > 10 * error, "rare, long branches are over-represented"
