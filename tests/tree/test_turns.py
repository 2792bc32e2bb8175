"""Trees over turns: a scripted world answers, in any order, and the tree is a function of the seed alone."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.test_search import EOS, config, decode, sample
from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.advantage import leaf_advantages
from treepo_mega.tree.history import Observation
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import STOP_REASONS, TURN_STOP_REASONS, StopRules, TurnRules

PROMPT = [7, 8, 9]
RULES = TurnRules(max_turns=3, max_observation_len=12)


def world(turn: list[int], rewrites: bool = False) -> tuple[Observation | None, bool]:
    """(observation, lost) as a function of the turn: most turns are answered, some are the last, a few are lost.

    `rewrites`: the observation hides some of the turn, and of what stands before it, and may restate some.
    """
    rng = random.Random(derive_seed("world", *turn))
    draw = rng.random()
    if draw < 0.1:
        return None, True
    if draw < 0.3:
        return None, False
    said = [rng.randrange(3, 30) for _ in range(rng.randint(1, 6))]
    if not rewrites:
        return Observation(said), False
    return Observation(said, hidden=rng.randint(0, len(turn) + 1), restated=rng.randrange(len(said))), False


def grow(
    cfg: RolloutConfig,
    rules: TurnRules | None = RULES,
    *,
    seed: int = 1,
    order: int | None = None,
    rewrites: bool = False,
) -> Tree:
    stop = StopRules.from_config(cfg, [EOS], decode, rules)
    search = TreeSearch("p", PROMPT, cfg, seed=seed, stop=stop, turns=rules)
    shuffler = random.Random(order)
    pending: list[tuple[str, object]] = []
    version = 0
    while not search.done:
        if search.paused:
            assert not pending
            version += 1
            state = json.loads(json.dumps(search.state_dict()))
            search = TreeSearch("p", PROMPT, cfg, seed=seed + 1, stop=stop, turns=rules)
            search.load_state_dict(state)
            search.resume(version, cfg)
            continue
        pending += [("want", want) for want in search.wants()]
        pending += [("turn", node_id) for node_id in search.turns_ended()]
        if order is not None:
            shuffler.shuffle(pending)
        kind, what = pending.pop()
        if kind == "turn":
            observation, lost = world(search.tree.turn(what), rewrites)
            search.observe(what, observation, lost=lost)
            continue
        tokens = sample(what.prefix, what.seed, what.max_tokens, 0.2, 0.02)
        law = [-((what.prefix[-1] + k) % 7) / 3 for k in range(max(what.peek, what.top))]
        top = [(token, logprob) for token, logprob in enumerate(law)][: what.top]
        # Every second policy is sure of all it says: then any place is as good as another.
        entropies = [(token % 5) / 4 * (seed % 2) for token in tokens] if what.entropy else []
        segment = Segment(tokens, [-t / 10 for t in tokens], "length", law[: what.peek], entropies, top)
        search.take(what.node_id, segment)
    assert not pending and not search.turns_ended()
    return search.tree


configs = st.builds(
    config,
    n_samples_per_prompt=st.integers(1, 12),
    segment__length=st.integers(1, 8),
    max_response_len=st.integers(1, 40),
    branching__factor=st.integers(1, 3),
    fallback__from=st.sampled_from(["finished", "any", "longest", "none"]),
    mode=st.sampled_from(["tree", "sequential"]),
    branching__transfer=st.sampled_from(["level", "quota"]),
    segment__end=st.sampled_from(["length", "turn"]),
    branching__after_observation=st.none() | st.integers(1, 5),
    branching__budget__kind=st.sampled_from(["equal", "low_prob", "entropy"]),
    branching__budget__signal=st.sampled_from(["segment", "branch_point"]),
    branching__budget__top_k=st.integers(1, 3),
    branching__at=st.sampled_from(["border", "fork"]),
    branching__fork__draw=st.sampled_from(["again", "other"]),
    branching__fork__distance=st.integers(1, 4),
    partial_rollout=st.none() | st.integers(1, 20),
)


@examples(150)
@given(configs, st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())
def test_order_of_answers_does_not_matter_and_every_path_is_a_dialogue(cfg, seed, order, rewrites):
    tree = grow(cfg, seed=seed, rewrites=rewrites)
    assert tree == grow(cfg, seed=seed, order=order, rewrites=rewrites)
    assert len(tree.leaves) == cfg.n_samples_per_prompt or tree.shortfall
    for node in tree.nodes[1:]:
        above = tree.nodes[node.parent]
        if node.observation:
            said = Observation(node.tokens, node.hidden, node.restated)
            assert (said, False) == world(tree.turn(above.id), rewrites), "it answers the turn above it"
            assert above.tokens[-1] == EOS and above.children == [node.id] and node.children
            continue
        assert EOS not in node.tokens[:-1]
        assert (node.stop is None) == bool(node.children)
        if cfg.forks:
            continue
        # What it was sampled after: the prompt, turns with their EOS, and what was said between them.
        prefix = tree.prefix(node.parent)
        assert prefix == shown(tree, above.id)
        room = min(cfg.segment_tokens, cfg.max_response_len - tree.response_length(above.id))
        again = sample(prefix, derive_seed(seed, *node.path), room, 0.2, 0.02)
        assert node.tokens == again[: len(node.tokens)]
    for leaf in tree.leaves:
        assert tree.nodes[leaf].stop in STOP_REASONS + TURN_STOP_REASONS
        assert tree.response_length(leaf) <= cfg.max_response_len
        assert tree.observed_length(leaf) <= RULES.max_observation_len
        assert len(tree.prefix(leaf)) <= len(PROMPT) + cfg.max_response_len + RULES.max_observation_len
        assert tree.turns(leaf) <= RULES.max_turns
    assert tree.counts["turns"] >= sum(node.observation for node in tree.nodes)


def shown(tree: Tree, node_id: int) -> list[int]:
    """What a policy sees behind a node: all that was said in order, each observation taking away what it hides."""
    seen: list[int] = []
    for node in (tree.nodes[each] for each in tree.ancestry(node_id)):
        seen = [*seen[: len(seen) - node.hidden], *node.tokens]
    return seen


@examples(40)
@given(configs, st.integers(0, 10**6))
def test_a_world_that_never_answers_changes_nothing(cfg, seed):
    silent = grow(cfg, TurnRules(max_turns=0, max_observation_len=9), seed=seed)
    plain = grow(cfg, None, seed=seed)
    assert silent.nodes == plain.nodes and silent.leaves == plain.leaves


def test_answers_that_do_not_fit_end_the_path():
    cfg = config(n_samples_per_prompt=1, max_response_len=20)
    stop = StopRules.from_config(cfg, [EOS], decode)
    search = TreeSearch("p", PROMPT, cfg, seed=1, stop=stop, turns=TurnRules(max_turns=9, max_observation_len=3))
    (want,) = search.wants()
    search.take(want.node_id, Segment([5, EOS], [-0.1, -0.1], "stop"))
    (turn,) = search.turns_ended()
    assert not search.done
    for wrong, said in ((99, "only at"), (turn, "at least one token")):
        with pytest.raises(ValueError, match=said):
            search.observe(wrong, Observation([]))
    search.observe(turn, Observation([1, 2, 3, 4]))
    assert search.done
    assert search.tree.nodes[search.tree.leaves[0]].stop == "context"


def test_an_observation_is_no_group_of_its_own():
    """Credit by subgroups is that of the same tree without observations."""
    with_answers = Tree.start("p", [1])
    without = Tree.start("p", [1])
    for tree, answers in ((with_answers, True), (without, False)):
        for rewards in ((1.0, 0.0), (1.0, 1.0, 0.0)):
            turn = tree.add_child(0).id
            above = tree.observe(turn, [5]).id if answers else turn
            for reward in rewards:
                tree.leaves.append(tree.add_child(above).id)
                tree.rewards.append(reward)
    for limit in (None, 1):
        got = leaf_advantages(with_answers, "treepo", max_subgroup_depth=limit)
        assert got == pytest.approx(leaf_advantages(without, "treepo", max_subgroup_depth=limit))


def test_where_steps_end_changes_nothing_but_whose_weights_sampled():
    beyond = 0
    for seed in range(30):
        whole = grow(config(n_samples_per_prompt=6), seed=seed)
        in_steps = grow(config(n_samples_per_prompt=6, partial_rollout=3), seed=seed, order=seed)
        assert [(node.path, node.tokens, node.stop) for node in in_steps.nodes] == [
            (node.path, node.tokens, node.stop) for node in whole.nodes
        ]
        assert in_steps.leaves == whole.leaves and in_steps.counts == whole.counts
        for node in in_steps.nodes[1:]:
            reach = 3 * (node.policy_version + 1)
            assert node.observation or in_steps.response_length(node.parent) < reach
            beyond += not node.observation and len(in_steps.response(node.parent)) >= reach
    assert beyond, "what tools said is no growth of a path"


def test_forks_start_after_observations_and_never_within_one():
    cfg = config(n_samples_per_prompt=12, max_response_len=40, branching__at="fork", branching__fork__distance=1)
    behind = 0
    for seed in range(20):
        trees = [grow(cfg, seed=seed), grow(cfg.replace({"segment.end": "turn"}), seed=seed)]
        for tree in trees:
            for node in tree.nodes[1:]:
                branches = len(node.children) > 1
                behind += branches and node.observation
                assert not (branches and tree.answered(node.id))
        for node in trees[1].nodes[1:]:
            assert len(node.children) < 2 or node.observation, "segments that are turns fork between turns alone"
    assert behind >= 10


def test_segments_that_are_turns_end_where_turns_end():
    cfg = config(n_samples_per_prompt=8, max_response_len=40, segment__end="turn", segment__length=2)
    trees = [grow(cfg, seed=seed) for seed in range(20)]
    longest = max(len(node.tokens) for tree in trees for node in tree.nodes[1:] if not node.observation)
    assert longest > 8, "no length cuts a turn"
    for tree in trees:
        for node in tree.nodes[1:]:
            assert node.observation or node.parent == 0 or tree.nodes[node.parent].observation


class Talker:
    """A search whose every turn is `[5, EOS]` and answered, until `answers` of them are; others talk on without end."""

    def __init__(self, cfg: RolloutConfig, *, answers: int = 9, answered: tuple[int, ...] | None = None) -> None:
        rules = TurnRules(answers, 100)
        stop = StopRules.from_config(cfg, [EOS], decode, rules)
        self.search = TreeSearch("p", PROMPT, cfg, seed=1, stop=stop, turns=rules)
        self.answered = answered
        """Children of the prompt whose paths end turns; None: all."""

    def level(self, laws: dict[int, list[float]] | None = None) -> list[int]:
        """One level of segments; returns the children that each of its paths gets, in path order."""
        tree = self.search.tree
        wants = self.search.wants()
        for want in wants:
            child = tree.nodes[want.node_id].path[0]
            ends = self.answered is None or child in self.answered
            tokens = [5, EOS] if ends else [5] * want.max_tokens
            self.search.take(want.node_id, Segment(tokens, [-1.0] * len(tokens), "length", [-1.0] * want.peek))
        for node_id in self.search.turns_ended():
            self.search.observe(node_id, Observation([6, 7]))
        # Looks behind observations, where the budget asks for them.
        for want in self.search.wants() if laws is not None else []:
            assert tree.nodes[want.node_id].observation and want.max_tokens == 1
            law = (laws or {})[tree.nodes[want.node_id].path[0]]
            self.search.take(want.node_id, Segment([3], [-1.0], "length", top=list(enumerate(law))))
        return [len(tree.nodes[tree.below(want.node_id)].children) for want in wants]


def test_paths_branch_more_widely_right_after_an_observation():
    cfg = config(n_samples_per_prompt=16, max_response_len=40, branching__factor=1, branching__initial=[2, 2])
    wide = cfg.replace({"branching.after_observation": 4})
    assert Talker(cfg, answered=(0,)).level() == [1, 1]
    for transfer in ("level", "quota"):
        talker = Talker(wide.replace({"branching.transfer": transfer}), answered=(0,))
        assert talker.level() == [4, 1], "in the middle of a turn it goes on alone"
    narrow = cfg.replace({"branching.factor": 3, "branching.after_observation": 1})
    assert Talker(narrow, answered=(0,)).level() == [1, 3]


def test_a_budget_by_entropy_looks_behind_observations():
    cfg = config(n_samples_per_prompt=16, max_response_len=40, branching__initial=[2, 2], segment__end="turn")
    by_entropy = cfg.replace({"branching.budget.kind": "entropy", "branching.budget.top_k": 2})
    sure = [-0.001, -7.0]
    torn = [-0.7, -0.7]
    assert Talker(by_entropy).level({0: sure, 1: torn}) == [1, 3]
    talker = Talker(by_entropy)
    assert talker.level({0: torn, 1: sure}) == [3, 1]
    assert talker.search.tree.counts["peeked_tokens"] == 2
    with pytest.raises(ValueError, match="needs the likeliest tokens"):
        Talker(by_entropy).level({0: [], 1: []})
