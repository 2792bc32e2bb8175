"""Graded trees that get more leaves: old leaves and grades stay, new ones join, whatever the order of arrival."""

from __future__ import annotations

import json
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
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.regrow import new_leaves, with_grades
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

EOS = 0


def config(**changes: object) -> RolloutConfig:
    values = {"segment__length": 3, "max_response_len": 18, "n_samples_per_prompt": 4}
    return rollout_config(**{**values, **changes})


def grow(cfg: RolloutConfig, seed: int, order: random.Random, begun: Tree | None = None) -> Tree:
    """One tree; what is sampled depends on the want alone."""
    stop = StopRules.from_config(cfg, [EOS], str)
    search = TreeSearch("p", [7, 8], cfg, seed=seed, stop=stop, begun=begun)
    run(search, order)
    assert search.done
    return search.tree


def run(search: TreeSearch, order: random.Random) -> None:
    """Deliver all that may be sampled in this step, in any order."""
    pending = search.wants()
    while pending:
        order.shuffle(pending)
        want = pending.pop()
        rng = random.Random(derive_seed(want.seed, *want.prefix))
        tokens = [rng.randrange(9) for _ in range(want.max_tokens)]
        tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        entropies = [rng.random() for _ in tokens] if want.entropy else []
        peek = [-rng.random() for _ in range(want.peek)]
        logprobs = [-rng.random() for _ in tokens]
        top = [(token, math.log(0.1)) for token in rng.sample(range(9), 9)][: want.top]
        search.take(want.node_id, Segment(tokens, logprobs, "length", peek, entropies, top))
        pending += search.wants()


def grade(tree: Tree) -> None:
    """Every leaf a grade of its own: they must find their leaves again."""
    tree.rewards = [float(derive_seed(*tree.response(leaf), leaf) % 10**6) for leaf in tree.leaves]
    tree.verdicts = [reward + 1 for reward in tree.rewards]


configs = (
    st.builds(
        config,
        branching__transfer=st.sampled_from(["level", "quota"]),
        branching__budget__kind=st.sampled_from(["equal", "entropy"]),
        branching__initial=st.sampled_from([None, (2, 4)]),
        fallback__from=st.sampled_from(["finished", "any"]),
    )
    | st.builds(
        config,
        branching__at=st.just("fork"),
        branching__fork__distance=st.integers(1, 4),
        branching__fork__threshold=st.sampled_from([None, 0.7]),
        branching__fork__draw=st.sampled_from(["again", "other"]),
        branching__fork__waves=st.integers(1, 3),
        branching__initial=st.sampled_from([None, (2, 4)]),
        segment__end=st.sampled_from(["length", "newline"]),
    )
    | st.builds(
        config,
        branching__at=st.just("fork"),
        branching__fork__signal=st.just("logprob"),
        branching__fork__draw=st.sampled_from(["again", "other"]),
        branching__fork__distance=st.integers(1, 4),
    )
    | st.builds(config, mode=st.just("sequential"))
)


@examples(100)
@given(configs, st.integers(5, 16), st.integers(0, 999), st.integers(0, 99))
def test_a_tree_grows_on_from_its_graded_leaves(cfg, width, seed, order):
    before = grow(cfg, seed, random.Random(0))
    grade(before)
    untouched = before.to_dict()
    wide = cfg.model_copy(update={"n_samples_per_prompt": width})
    tree = grow(wide, seed, random.Random(order), begun=before)
    assert before.to_dict() == untouched
    assert tree == grow(wide, seed, random.Random(order + 1), begun=before), "in any order of arrival"
    assert len(tree.leaves) == width and tree.shortfall is None and tree.rewards == []
    new = new_leaves(tree, before)
    assert len(new.leaves) == width - 4
    grade(new)
    whole = with_grades(new, before)
    assert whole.leaves == tree.leaves
    said = sorted((tree.response(leaf), reward) for leaf, reward in zip(whole.leaves, whole.rewards, strict=True))
    both = [(new, new), (before, before)]
    assert said == sorted(
        (of.response(leaf), reward)
        for of, graded in both
        for leaf, reward in zip(graded.leaves, of.rewards, strict=True)
    )
    assert whole.verdicts == [reward + 1 for reward in whole.rewards]
    assert whole.counts["generated_tokens"] > before.counts["generated_tokens"], "what both stages cost"


@examples(60)
@given(configs, st.integers(5, 12), st.integers(0, 999), st.integers(0, 99))
def test_a_tree_that_is_carried_over_before_and_while_it_grows_is_the_tree_it_would_have_been(cfg, width, seed, order):
    shuffle = random.Random(order)
    reached = []
    trees = []
    for reach in (6, 1000):
        partial = rollout_config(cfg, partial_rollout=reach)
        before, version = carry(partial, seed, shuffle, 1)
        grade(before)
        tree, last = carry(rollout_config(partial, n_samples_per_prompt=width), seed, shuffle, version, before)
        assert new_leaves(tree, before).leaves and tree.shortfall is None
        reached.append(last)
        told = [replace(node, policy_version=0) for node in tree.nodes]
        trees.append([told, tree.leaves, tree.counts, before.rewards])
    assert trees[0] == trees[1] and reached[1] == 1
    longest = max(len(tree.response(leaf)) for leaf in tree.leaves)
    assert (reached[0] > 1) == (longest > 6 and cfg.mode == "tree"), "it took more than one step"


def carry(
    cfg: RolloutConfig, seed: int, order: random.Random, version: int, begun: Tree | None = None
) -> tuple[Tree, int]:
    """A tree over as many steps as it takes, written down between them; and the last step's version."""
    stop = StopRules.from_config(cfg, [EOS], str)
    search = TreeSearch("p", [7, 8], cfg, seed=seed, stop=stop, policy_version=version, begun=begun)
    assert not search.paused, "what begins may begin at once, however long the paths are that it begins on"
    run(search, order)
    while not search.done:
        state = json.loads(json.dumps(search.state_dict()))
        search = TreeSearch("p", [7, 8], cfg, seed=seed + 1, stop=stop, begun=begun)
        search.load_state_dict(state)
        version += 1
        search.resume(version, cfg)
        run(search, order)
    return search.tree, version


def test_a_leaf_that_lost_its_reward_is_made_up_for():
    before = grow(config(), 3, random.Random(0))
    grade(before)
    kept = before.only([0, 2, 3])
    kept.shortfall = "1 of 4 rewards lost"
    tree = grow(config(n_samples_per_prompt=8), 3, random.Random(0), begun=kept)
    new = new_leaves(tree, kept)
    assert len(tree.leaves) == 8 and len(new.leaves) == 5 and tree.shortfall is None


def test_forks_start_on_what_was_sampled_and_borders_at_the_prompt():
    fork = config(branching__at="fork", branching__initial=(4, 4), branching__fork__distance=1)
    before = grow(fork, 5, random.Random(0))
    tree = grow(fork.model_copy(update={"n_samples_per_prompt": 12}), 5, random.Random(0), begun=before)
    assert len(before.nodes[ROOT].children) == len(tree.nodes[ROOT].children) == 4 and tree.counts["forks"] == 8
    border = config()
    before = grow(border, 5, random.Random(0))
    tree = grow(border.model_copy(update={"n_samples_per_prompt": 12}), 5, random.Random(0), begun=before)
    planted = [[child for child in one.nodes[ROOT].children if not one.nodes[child].fallback] for one in (before, tree)]
    assert list(map(len, planted)) == [2, 4]


def test_there_must_be_something_to_grow():
    before = grow(config(), 3, random.Random(0))
    with pytest.raises(ValueError, match="4 leaves already, 0 to grow"):
        grow(config(), 3, random.Random(0), begun=before)
