"""Trees carried over to a later step: paused at the reach of a step, written down, and gone on with."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.rollouts import rollout_config
from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.carry import CarriedTreeError
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

EOS = 0


def config(**changes: object) -> RolloutConfig:
    values = {"n_samples_per_prompt": 8, "segment__length": 4, "max_response_len": 32, "partial_rollout": 8}
    return rollout_config(**{**values, **changes})


def start(cfg: RolloutConfig, seed: int) -> tuple[TreeSearch, StopRules]:
    stop = StopRules.from_config(cfg, [EOS], str)
    return TreeSearch("p", [7, 8], cfg, seed=seed, stop=stop, policy_version=10), stop


def run(search: TreeSearch, order: random.Random) -> None:
    """Deliver everything that may be sampled in this step, in any order."""
    pending = search.wants()
    while pending:
        order.shuffle(pending)
        want = pending.pop()
        rng = random.Random(derive_seed(want.seed, *want.prefix))
        tokens = [rng.randrange(12) for _ in range(want.max_tokens)]
        tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        peek = [-rng.random() for _ in range(want.peek)]
        search.take(want.node_id, Segment(tokens, [-rng.random() for _ in tokens], "length", peek))
        pending += search.wants()


def grow(cfg: RolloutConfig, seed: int, order: int, through_json: bool) -> tuple[Tree, int]:
    search, _ = start(cfg, seed)
    steps = 1
    run(search, random.Random(order))
    while not search.done:
        assert search.paused
        reach = steps * cfg.partial_rollout
        for node in search.tree.nodes[1:]:
            before = len(search.tree.response(node.parent))
            assert not node.tokens or before < reach, "nothing was sampled beyond this step's reach"
        if through_json:
            written = json.dumps(search.state_dict())
            search, _ = start(cfg, seed + 1)
            search.load_state_dict(json.loads(written))
            assert search.paused and not search.wants()
        search.resume(10 + steps, cfg)
        steps += 1
        run(search, random.Random(order + steps))
    return search.tree, steps


configs = st.builds(
    config,
    branching__transfer=st.sampled_from(["level", "quota"]),
    branching__budget__kind=st.sampled_from(["equal", "low_prob", "entropy"]),
    fallback__from=st.sampled_from(["finished", "any"]),
)


def shape(tree: Tree) -> list[object]:
    return [(n.path, n.tokens, n.logprobs, n.stop, n.fallback) for n in sorted(tree.nodes, key=lambda n: n.path)]


@examples(60)
@given(configs, st.integers(0, 999), st.integers(0, 99), st.integers(0, 99))
def test_a_carried_tree_is_the_tree_it_would_have_been(cfg, seed, order, other):
    """Same seeds, so with unchanged weights the same tokens: carried over or not, written down or not, in any order."""
    tree, steps = grow(cfg, seed, order, through_json=True)
    again, _ = grow(cfg, seed, other, through_json=False)
    whole, one = grow(cfg.model_copy(update={"partial_rollout": 1000}), seed, order, through_json=False)
    assert shape(tree) == shape(again) == shape(whole) and one == 1
    assert len(tree.leaves) == 8 and tree.leaves == again.leaves == whole.leaves
    assert tree.counts == again.counts == whole.counts
    versions = {n.policy_version for n in tree.nodes[1:]}
    assert versions <= set(range(10, 10 + steps))
    for node in tree.nodes[1:]:
        if len(tree.response(node.parent)) >= 8 * steps - 8:
            assert node.policy_version == 10 + steps - 1, "sampled in the last step, by its weights"
        assert node.parent == 0 or node.fallback or node.policy_version >= tree.nodes[node.parent].policy_version


def test_only_a_paused_tree_is_written_down_and_only_under_its_own_rule():
    cfg = config()
    search, _ = start(cfg, 3)
    with pytest.raises(ValueError, match="only a paused tree"):
        search.state_dict()
    run(search, random.Random(0))
    state = search.state_dict()
    other, _ = start(cfg.replace({"branching.transfer": "quota"}), 3)
    with pytest.raises(CarriedTreeError, match=r"another rollout.branching.transfer \(level\) than 'quota'"):
        other.load_state_dict(state)
