"""Trees over turns: a policy that calls at random, real tools in real workers, and an engine that ends in any order.

The policy says a question of the agent's task, an answer, or nonsense, as the seed of its segment says. The shipped
tiny agent's tokenizer and template write what stands between turns.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.rollout.fakes import FakeEngine
from treepo_mega.config import ConfigError, check, load_config
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.tasks import hidden_number as task
from treepo_mega.engine.stream import Finished, SegmentRequest
from treepo_mega.environment import EnvironmentClassError, setup
from treepo_mega.environment.contract import read_manifest
from treepo_mega.environment.setup import Environment, open_environment
from treepo_mega.rollout.dealing import LocalQueue
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.in_flight import GenerationTimeout
from treepo_mega.rollout.jobs import Job, Rewards
from treepo_mega.tree.node import Tree

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "examples" / "tiny_agent"
ID = {symbol: index for index, symbol in enumerate(task.SYMBOLS)}
EOS = ID["<eos>"]


def configured(*overrides: str):
    """The shipped recipe, of four prompts a step."""
    few = [f"data.train=[{{path: '{AGENT}/train.jsonl@[0:8]'}}]", "rollout.rollout_batch_size=4"]
    return load_config(ROOT / "examples" / "agent_cpu.yaml", [*few, *overrides])


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
        return Finished(request.name, tokens, logprobs, ends, 0, peek, top=list(enumerate(law))[: request.top])


class Watch:
    """Notes each tree when it is complete, with what its environment gave."""

    def __init__(self) -> None:
        self.rewards: dict[int, Rewards | None] = {}

    def tree_done(self, index: int, tree: Tree, rewards: Rewards | None) -> None:
        assert index not in self.rewards
        self.rewards[index] = rewards

    def tree_paused(self, index: int, state: dict[str, Any]) -> None:
        raise AssertionError("no tree is carried over")

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


def grow(cfg, tokenizer, order: int = 0) -> tuple[list[Tree], list[Rewards], dict[str, float]]:
    """A step's trees with an engine whose requests end in the order `order`."""
    environment, prompts = opened(cfg, tokenizer)
    try:
        generator = Generator(Policy(random.Random(order)), cfg, tokenizer, environment=environment)
        watch = Watch()
        grown = generator.grow([Job(p) for p in prompts], LocalQueue(range(len(prompts))), step=1, watcher=watch)
        assert environment.pool.wait() == {} and environment.pool.alive == 0, "all states are freed"
        trees = [grown.trees[index] for index in range(len(prompts))]
        return trees, [watch.rewards[index] or {} for index in range(len(prompts))], generator.counts
    finally:
        environment.close()


def said(tree: Tree, node_id: int) -> list[str]:
    """The symbols from the prompt to a node."""
    return [task.SYMBOLS[token] for token in tree.prefix(node_id)]


def by_definition(tree: Tree, leaf: int, secret: int) -> float:
    """What a trajectory earned, from what it says: each call that could be made costs."""
    calls = 0
    for node in (tree.nodes[each] for each in tree.ancestry(leaf)):
        if node.observation:
            answer = [task.SYMBOLS[token] for token in node.tokens][1]
            up = said(tree, node.parent)
            if answer in task.ANSWERS:
                assert up[-4] == task.CALL and answer == task.compare(secret, int(up[-3]))
                calls += 1
            else:
                assert answer == "<unk>" and up[-3] == "?", "an error, in words that this policy has no tokens for"
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


def test_states_beyond_the_limit_are_rebuilt_and_change_nothing(tokenizer):
    plain = grow(configured(), tokenizer)
    tight = grow(configured("environment.max_states=1"), tokenizer)
    assert [tree.to_dict() for tree in tight[0]] == [tree.to_dict() for tree in plain[0]]
    assert tight[1] == plain[1]
    assert tight[2]["env_replays"] > 0 == plain[2]["env_replays"]


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
        ("rollout.partial_rollout=8", r"rollout\.partial_rollout 8: a state of an environment does not outlive"),
        ("rollout.branching.at=fork", r"rollout\.branching\.at fork: .*set rollout\.branching\.at=border"),
        ("rollout.leaves=adaptive", r"rollout\.leaves adaptive"),
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
        ("rollout.engine.tensor_parallel_size=2", r"tensor_parallel_size 2: each rank of an engine"),
        ("data.apply_chat_template=false", r"data\.apply_chat_template false"),
        ("data.environment=null", r"reward\.functions\.1\.verifier environment .*set data\.environment"),
    ],
)
def test_what_turns_cannot_be_combined_with_is_refused_by_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        check(configured(*override.split()), 2 if "tensor" in override else 1)


def test_a_reward_that_the_class_does_not_give_is_refused(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(BROKEN.format(fault="pass").split("    def get_reward")[0])
    with pytest.raises(EnvironmentClassError, match=r"no get_reward.*data\.verifier"):
        open_environment(configured(f"data.environment={path}:Broken"))
