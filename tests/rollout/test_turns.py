"""Trees over turns: a policy that calls at random, real tools in real workers, and an engine that ends in any order.

The policy says a question of the agent's task, an answer, or nonsense, as the seed of its segment says. The shipped
tiny agent's tokenizer and template write what stands between turns.
"""

from __future__ import annotations

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore
from transformers import AutoTokenizer

from tests.rollout.fakes import FakeEngine
from treepo_mega.config import ConfigError, check, load_config
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.tasks import hidden_number as task
from treepo_mega.engine.stream import Finished, SegmentRequest
from treepo_mega.environment import EnvironmentClassError, setup
from treepo_mega.environment.contract import read_manifest
from treepo_mega.environment.setup import Environment, open_environment
from treepo_mega.rollout.dealing import LocalQueue, SharedQueue
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.in_flight import GenerationTimeout
from treepo_mega.rollout.jobs import Job, Rewards, job_of, stored
from treepo_mega.tree.advantage import set_rewards
from treepo_mega.tree.node import Tree
from treepo_mega.tree.regrow import new_leaves

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "examples" / "tiny_agent"
ID = {symbol: index for index, symbol in enumerate(task.SYMBOLS)}
EOS = ID["<eos>"]


def configured(*overrides: str):
    """The shipped recipe, of four prompts a step."""
    few = [f"data.train=[{{path: '{AGENT}/train.jsonl@[0:8]'}}]", "rollout.rollout_batch_size=4"]
    return load_config(ROOT / "examples" / "agent_cpu.yaml", [*few, *overrides])


def allowed(*overrides: str):
    """As `configured`, and its rules hold."""
    cfg = configured(*overrides)
    assert check(cfg, 1)
    return cfg


class Policy(FakeEngine):
    """Says what the seed of a segment says: a question, an answer, a call that is none, or a call that fails."""

    hf_dir = AGENT
    vocab_size = len(task.SYMBOLS)

    def finish(self, request: SegmentRequest) -> Finished:
        drawn = random.Random(request.seed)
        number = str(drawn.randrange(32))
        said = drawn.choice(
            [
                [task.CALL, number, task.CALL_END],
                [task.CALL, number, task.CALL_END],
                [task.CALL, "?", task.CALL_END],
                [number],
            ]
        )
        tokens = [*(ID[symbol] for symbol in said), EOS][: request.max_tokens]
        ends = "stop" if tokens[-1] == EOS else "length"
        logprobs = [-drawn.random() for _ in tokens]
        law = sorted((-drawn.random() for _ in range(max(request.peek, request.top))), reverse=True)
        peek = law[: request.peek] if ends == "length" else []
        entropies = [drawn.random() for _ in tokens] if request.entropy else []
        return Finished(request.name, tokens, logprobs, ends, 0, peek, entropies, list(enumerate(law))[: request.top])


class Watch:
    """Notes each tree when it is complete, with what its environment gave."""

    def __init__(self) -> None:
        self.rewards: dict[int, Rewards | None] = {}
        self.paused: list[int] = []

    def tree_done(self, index: int, tree: Tree, rewards: Rewards | None) -> None:
        assert index not in self.rewards
        self.rewards[index] = rewards

    def tree_paused(self, index: int, state: dict[str, Any]) -> None:
        self.paused.append(index)

    def step_done(self, occupancy: Any) -> None: ...

    def waited_for_tools(self) -> None: ...

    def settle(self) -> bool:
        return False


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(AGENT)


@pytest.fixture(scope="module", autouse=True)
def _read_once():
    """The shipped class is read in a process of its own once: that imports torch."""
    shipped = read_manifest(configured().data.environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "read_manifest", lambda name: shipped if name == shipped.name else read_manifest(name))
        yield


def opened(cfg, tokenizer) -> tuple[Environment, list[Prompt]]:
    environment = open_environment(cfg)
    assert environment is not None
    prompts = load_prompts(cfg.data.train, cfg.data, tokenizer, vocab_size=len(task.SYMBOLS), opener=environment)
    return environment, list(prompts)[: cfg.rollout.rollout_batch_size]


OPENED: dict[str, list[Prompt]] = {}
"""What `prompts_of` has opened."""


def prompts_of(cfg, tokenizer) -> list[Prompt]:
    """The prompts alone: what the first states say is the same in every test, and a worker is a process."""
    key = f"{cfg.data.model_dump_json()} {cfg.rollout.rollout_batch_size} {cfg.environment.model_dump_json()}"
    if key not in OPENED:
        environment, OPENED[key] = opened(cfg, tokenizer)
        environment.close()
    return OPENED[key]


def grow(
    cfg, tokenizer, order: int = 0, jobs: list[Job] | None = None
) -> tuple[list[Tree], list[Rewards], dict[str, float]]:
    """A step's trees with an engine whose requests end in the order `order`; those that pause go on in later steps.

    Each step has workers of its own, as after a restart. `jobs`: in place of new trees of the prompts.
    """
    prompts = prompts_of(cfg, tokenizer)
    jobs = [Job(prompt) for prompt in prompts] if jobs is None else jobs
    trees: dict[int, Tree] = {}
    rewards: dict[int, Rewards] = {}
    counts: dict[str, float] = {"steps": 0}
    while len(trees) < len(jobs):
        left = [index for index in range(len(jobs)) if index not in trees]
        counts["steps"] += 1
        environment = open_environment(cfg)
        assert environment is not None
        try:
            generator = Generator(Policy(random.Random(order)), cfg, tokenizer, environment=environment)
            watch = Watch()
            these = [jobs[index] for index in left]
            grown = generator.grow(these, LocalQueue(range(len(left))), step=int(counts["steps"]), watcher=watch)
            assert environment.pool.wait() == {} and environment.pool.alive == 0, "all states are freed"
        finally:
            environment.close()
        assert set(watch.rewards) == set(grown.trees) and sorted(watch.paused) == sorted(grown.paused)
        trees |= {left[index]: tree for index, tree in grown.trees.items()}
        rewards |= {left[index]: found or {} for index, found in watch.rewards.items()}
        for index, state in grown.paused.items():
            written = json.dumps(stored(replace(these[index], state=state)))
            jobs[left[index]] = job_of(json.loads(written))
        counts |= {name: counts.get(name, 0) + value for name, value in generator.counts.items()}
    return [trees[index] for index in range(len(jobs))], [rewards[index] for index in range(len(jobs))], counts


def said(tree: Tree, node_id: int) -> list[str]:
    """The symbols from the prompt to a node."""
    return [task.SYMBOLS[token] for token in tree.prefix(node_id)]


def asked(tree: Tree, turn: int) -> list[int]:
    """The numbers that a turn asks about: forks may put two calls into one, and one that is none spoils both."""
    said = "".join(task.SYMBOLS[token] for token in tree.turn(turn))
    calls = re.findall(f"{re.escape(task.CALL)}(.*?){re.escape(task.CALL_END)}", said)
    return [int(call) for call in calls] if all(call.isdigit() for call in calls) else []


def by_definition(tree: Tree, leaf: int, secret: int) -> float:
    """What a trajectory earned, from what it says: each call that could be made costs."""
    # Those whose answers did not fit were made all the same.
    calls = len(asked(tree, leaf)) if tree.nodes[leaf].stop == "context" else 0
    for node in (tree.nodes[each] for each in tree.ancestry(leaf)):
        if node.observation:
            words = [task.SYMBOLS[token] for token in node.tokens]
            numbers = asked(tree, node.parent)
            assert [word for word in words if word in task.ANSWERS] == [task.compare(secret, each) for each in numbers]
            assert numbers or "<unk>" in words, "an error, in words that this policy has no tokens for"
            calls += len(numbers)
    return -0.05 * calls


def test_observations_are_what_tools_say_and_rewards_those_of_each_path(tokenizer):
    cfg = configured()
    trees, rewards, counts = grow(cfg, tokenizer)
    secrets = [row["secret"] for row in map(json.loads, (AGENT / "train.jsonl").read_text().splitlines()[:4])]
    depths = set()
    for tree, earned, secret in zip(trees, rewards, secrets, strict=True):
        assert len(tree.leaves) == cfg.rollout.n_samples_per_prompt
        assert set(earned) == set(tree.leaves)
        for leaf in tree.leaves:
            depths.add(tree.turns(leaf))
            assert earned[leaf] == pytest.approx(by_definition(tree, leaf, secret))
            assert tree.response_length(leaf) <= cfg.rollout.max_response_len
            assert tree.observed_length(leaf) <= cfg.environment.max_observation_len
        for node in tree.nodes:
            if node.observation:
                assert said(tree, node.id)[-1] == "<assistant>" and node.logprobs == [0.0] * len(node.tokens)
                assert all(tree.nodes[child].tokens for child in node.children)
    assert depths >= {0, 1, 2}
    assert any(len(node.children) > 1 for tree in trees for node in tree.nodes if node.observation), "they branch there"
    assert sum(tree.counts["tool_errors"] for tree in trees) > 0
    calls = sum(tree.counts["tool_calls"] for tree in trees)
    too_long = sum(tree.nodes[leaf].stop == "context" for tree in trees for leaf in tree.leaves)
    assert calls == too_long + sum(node.observation for tree in trees for node in tree.nodes)
    assert counts["env_answers"] == calls - sum(tree.counts["tool_errors"] for tree in trees)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rollout.mode=sequential",),
        ("rollout.fallback.from=none",),
        ("rollout.segment.end=turn", "rollout.branching.factor=1", "rollout.branching.after_observation=4"),
        ("rollout.branching.budget.kind=entropy", "rollout.branching.budget.top_k=3"),
    ],
)
def test_trees_are_the_same_in_any_order_of_segments_and_answers(tokenizer, overrides):
    cfg = configured(*overrides)
    first = grow(cfg, tokenizer, order=1)
    again = grow(cfg, tokenizer, order=2)
    assert [tree.to_dict() for tree in first[0]] == [tree.to_dict() for tree in again[0]]
    assert first[1] == again[1]


FORGETFUL = (f"data.chat_template={AGENT}/forgets_calls.jinja", "environment.history=fork")
"""A template that shows no call of an earlier turn, but for its number; such a history is forked."""


def test_ranks_that_share_an_engine_hear_what_the_first_one_is_told(tokenizer):
    """Three ranks, one of which asks tools: all come to the trees of a rank that has the engine for itself."""
    shape = ("rollout.branching.at=fork", "environment.num_workers=1", *FORGETFUL)
    cfg = configured(*shape, "rollout.engine.tensor_parallel_size=3")
    prompts = prompts_of(cfg, tokenizer)
    store = HashStore()
    meeting = threading.Barrier(3, timeout=60)

    def rank_of(place: int) -> tuple[dict[int, Tree], Watch, float]:
        environment = open_environment(cfg)
        assert environment is not None
        try:
            engine = Policy(random.Random(5))
            engine.lockstep = meeting
            generator = Generator(engine, cfg, tokenizer, environment=environment)
            order = [list(range(len(prompts)))]
            queue = SharedQueue(store, "r", order, [1.0] * len(prompts), 0, rank=place, ranks=3, timeout_s=60)
            watch = Watch()
            jobs = [Job(prompt) for prompt in prompts]
            grown = generator.grow(jobs, queue, step=1, watcher=watch if place == 0 else None)
            assert environment.pool.wait() == {} and environment.pool.alive == 0
            return grown.trees, watch, environment.pool.counts["calls"]
        finally:
            environment.close()

    with ThreadPoolExecutor(3) as pool:
        first, *others = [each.result(timeout=120) for each in [pool.submit(rank_of, place) for place in range(3)]]
    alone, earned, _ = grow(configured(*shape), tokenizer, order=5)
    for trees, _, calls in (first, *others):
        # Not what a rank's prefix cache counts.
        assert [trees[index].to_dict() for index in range(len(prompts))] == [tree.to_dict() for tree in alone]
        assert (calls > 0) == (trees is first[0]), "tools are asked once"
    assert [first[1].rewards[index] for index in range(len(prompts))] == earned


@pytest.mark.parametrize("shape", [("rollout.partial_rollout=4",), ("rollout.branching.at=fork",)])
def test_a_rewritten_history_is_what_later_turns_see(tokenizer, shape):
    """A served model would see the same, turns stay as they were sampled, and no order of answers matters."""
    cfg = allowed(*FORGETFUL, *shape, "environment.num_workers=1")
    trees, rewards, _ = grow(cfg, tokenizer, order=1)
    again = grow(cfg, tokenizer, order=2)
    assert [names(tree) for tree in again[0]] == [names(tree) for tree in trees] and again[1] == rewards
    secrets = [row["secret"] for row in map(json.loads, (AGENT / "train.jsonl").read_text().splitlines()[:4])]
    hidden = 0
    for tree, earned, secret in zip(trees, rewards, secrets, strict=True):
        assert tree.counts["hidden_tokens"] >= sum(node.hidden for node in tree.nodes)
        for leaf in tree.leaves:
            assert earned[leaf] == pytest.approx(by_definition(tree, leaf, secret))
        for node in tree.nodes:
            if not node.observation:
                continue
            hidden += node.hidden
            words = said(tree, node.id)
            assert task.CALL not in words and task.CALL_END not in words
            turn = [task.SYMBOLS[token] for token in tree.turn(node.parent)]
            marks = (task.CALL, task.CALL_END)
            assert not any(word in marks for word in turn) or node.hidden > node.restated > 0
            # The call itself was sampled, and is trained. What stands for it is text that was encoded.
            left = "".join(word for word in turn if word not in marks)
            encoded = tokenizer(left, add_special_tokens=False)["input_ids"]
            assert not node.hidden or node.tokens[: node.restated] == encoded
    assert hidden > 0


def test_states_beyond_the_limit_are_rebuilt_and_change_nothing(tokenizer):
    plain = grow(configured(), tokenizer)
    tight = grow(configured("environment.max_states=1"), tokenizer)
    assert [tree.to_dict() for tree in tight[0]] == [tree.to_dict() for tree in plain[0]]
    assert tight[1] == plain[1]
    assert tight[2]["env_replays"] > 0 == plain[2]["env_replays"]


def names(tree: Tree) -> list[tuple]:
    """All that was said and earned, without whose weights said it."""
    return [(node.path, node.tokens, node.stop, node.observation) for node in tree.nodes]


@pytest.mark.parametrize("shape", [(), ("rollout.branching.at=fork",)])
def test_trees_that_go_on_in_later_steps_are_those_of_one_step(tokenizer, shape):
    whole = grow(configured(*shape, "debug.continue_paths=never"), tokenizer)
    cfg = allowed(*shape, "rollout.partial_rollout=4")
    carried = grow(cfg, tokenizer, order=3)
    assert carried[2]["steps"] > 1 and carried[2]["env_replays"] > 0 == whole[2]["env_replays"]
    assert [names(tree) for tree in carried[0]] == [names(tree) for tree in whole[0]]
    assert carried[1] == whole[1]
    for tree, other in zip(carried[0], whole[0], strict=True):
        assert {name: tree.counts[name] for name in ("tool_calls", "tool_errors", "turns")} == {
            name: other.counts[name] for name in ("tool_calls", "tool_errors", "turns")
        }


@pytest.mark.parametrize("shape", [(), ("rollout.branching.at=fork",)])
def test_trees_that_get_more_leaves_make_the_calls_again_that_these_build_on(tokenizer, shape):
    cfg = allowed(*shape, "rollout.leaves=adaptive", "rollout.first_leaves=4")
    prompts = prompts_of(cfg, tokenizer)
    first, earned, _ = grow(cfg, tokenizer, jobs=[Job(prompt, leaves=4) for prompt in prompts])
    for tree, rewards in zip(first, earned, strict=True):
        set_rewards(tree, [float(rewards[leaf]) for leaf in tree.leaves])
    jobs = [Job(prompt, leaves=12, begun=tree) for prompt, tree in zip(prompts, first, strict=True)]
    trees, rewards, counts = grow(cfg, tokenizer, jobs=jobs)
    again, _, _ = grow(cfg, tokenizer, order=4, jobs=jobs)
    assert [names(tree) for tree in again] == [names(tree) for tree in trees]
    assert counts["env_replays"] > 0
    secrets = [row["secret"] for row in map(json.loads, (AGENT / "train.jsonl").read_text().splitlines()[:4])]
    for tree, of_leaf, begun, secret in zip(trees, rewards, first, secrets, strict=True):
        assert set(of_leaf) == set(new_leaves(tree, begun).leaves) and len(of_leaf) == 8
        for leaf, reward in of_leaf.items():
            assert reward == pytest.approx(by_definition(tree, leaf, secret))


BROKEN = """
import os, time

class Broken:
    def reset(self, secret, **row):
        self.secret = secret

    def ask(self, number: int) -> str:
        '''Ask.

        Args:
            number: Anything.
        '''
        if number % 2:
            {fault}
        return "more"

    def get_reward(self):
        return float("nan") if self.secret % 2 else 1.0
"""


@pytest.mark.parametrize("on_error", ["observe", "lose"])
def test_a_tool_that_dies_is_an_observation_or_a_lost_leaf(tokenizer, tmp_path, on_error):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN.format(fault="os._exit(3)"))
    cfg = configured(f"data.environment={path}:Broken", f"environment.on_error={on_error}")
    trees, rewards, counts = grow(cfg, tokenizer)
    stops = {tree.nodes[leaf].stop for tree in trees for leaf in tree.leaves}
    assert counts["env_restarts"] > 0
    assert ("lost" in stops) == (on_error == "lose")
    for tree, earned in zip(trees, rewards, strict=True):
        for leaf in tree.leaves:
            if tree.nodes[leaf].stop == "lost":
                assert isinstance(earned[leaf], str)
    odd = [earned for earned in rewards for value in earned.values() if isinstance(value, str) and "finite" in value]
    assert odd, "a reward that is no number is lost, and says so"


def test_a_tool_that_hangs_costs_its_own_call_and_a_rollout_has_a_deadline(tokenizer, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN.format(fault="time.sleep(3600)"))
    cfg = configured(f"data.environment={path}:Broken", "environment.timeout_s=2", "rollout.timeout_s=1.0")
    with pytest.raises(GenerationTimeout, match=r"rollout\.timeout_s.*while tools ran: lower environment\.timeout_s"):
        grow(cfg, tokenizer)


def test_a_replay_that_differs_loses_its_trajectory_and_says_where(tokenizer, tmp_path):
    path = tmp_path / "fickle.py"
    path.write_text(BROKEN.format(fault="pass").replace('return "more"', 'return "<=>"[time.time_ns() % 3]'))
    cfg = configured(f"data.environment={path}:Broken", "rollout.partial_rollout=8", "rollout.rollout_batch_size=2")
    trees, rewards, counts = grow(cfg, tokenizer)
    assert counts["env_replays"] > 0
    said = {value for of_tree in rewards for value in of_tree.values() if isinstance(value, str)}
    assert any("a replay differs: ask answered otherwise" in reason for reason in said)
    lost = {leaf for tree in trees for leaf in tree.leaves if tree.nodes[leaf].stop == "lost"}
    assert lost, "a path that was to go on behind it does not"


def test_a_rollout_that_is_stopped_leaves_no_state(tokenizer):
    cfg = configured()
    environment, prompts = opened(cfg, tokenizer)
    try:
        engine = Policy(random.Random(0))

        def stop() -> None:
            raise KeyboardInterrupt

        engine.at_step = (12, stop)
        generator = Generator(engine, cfg, tokenizer, environment=environment)
        with pytest.raises(KeyboardInterrupt):
            generator.grow([Job(prompt) for prompt in prompts], LocalQueue(range(len(prompts))), step=1)
        assert environment.pool.counts["calls"] > 0 and environment.pool.alive == 0
    finally:
        environment.close()


def test_an_opening_stands_in_the_prompt_and_has_to_come_again(tokenizer, tmp_path):
    path = tmp_path / "opens.py"
    body = BROKEN.format(fault="pass").replace("self.secret = secret", "self.secret = secret\n        return {text}")
    path.write_text(body.format(text="'=7?'"))
    cfg = configured(f"data.environment={path}:Broken")
    environment, prompts = opened(cfg, tokenizer)
    environment.close()
    assert all(prompt.text.endswith("?=7?<assistant>") and prompt.opening == "=7?" for prompt in prompts)
    path.write_text(body.format(text="'=' + str(time.time_ns() % 9)"))
    _, rewards, _ = grow(cfg, tokenizer)
    reasons = {str(value) for earned in rewards for value in earned.values()}
    assert any("reset returned" in reason for reason in reasons)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "rollout.branching.at=fork rollout.branching.after_observation=3",
            r"rollout\.branching\.after_observation 3 has no effect with rollout\.branching\.at fork",
        ),
        ("debug.schedule=level", r"debug\.schedule level"),
        ("rollout.segment.end=turn rollout.token_budget=99", r"token_budget 99 with rollout\.segment\.end turn"),
        (
            "rollout.segment.end=turn rollout.fallback.from=none rollout.branching.after_observation=1",
            r"8 leaves are out of reach .* 2 branches at the prompt and 1 after each of 4 observations give 2",
        ),
        ("data.environment=null rollout.segment.end=turn", r"rollout\.segment\.end turn needs data\.environment"),
        (
            "data.environment=null rollout.branching.after_observation=3",
            r"rollout\.branching\.after_observation 3 has no effect without data\.environment",
        ),
        ("data.apply_chat_template=false", r"data\.apply_chat_template false"),
        ("data.environment=null", r"reward\.functions\.1\.verifier environment .*set data\.environment"),
    ],
)
def test_what_turns_cannot_be_combined_with_is_refused_by_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        check(configured(*override.split()), 1)


def test_a_reward_that_the_class_does_not_give_is_refused(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(BROKEN.format(fault="pass").split("    def get_reward")[0])
    with pytest.raises(EnvironmentClassError, match=r"no get_reward.*data\.verifier"):
        open_environment(configured(f"data.environment={path}:Broken"))
