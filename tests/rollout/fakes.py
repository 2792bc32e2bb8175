"""An engine and graders whose work ends in an order that a seed says. What they answer depends on what was asked.

The engine samples one token of 0 to 3 and an end token. An answer is right if its token is below the prompt's number:
prompts of 0 have no signal, and those of 1 to 3 may have.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from treepo_mega.config import Config, parse_config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardItem, RewardResult
from treepo_mega.engine.stream import Finished, SegmentRequest, SegmentStream
from treepo_mega.monitor.registry import depends_on_time
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.collect import Collector, Forest
from treepo_mega.rollout.generator import Generator
from treepo_mega.runtime import dist
from treepo_mega.tree.node import Tree

END_TOKEN = 9
LEAVES = 3
PROMPTS = 40


def fake_config(schedule: str = "async", **rollout: Any) -> Config:
    raw: dict[str, Any] = {
        "model": {"hf_checkpoint": "none"},
        "data": {"train": [{"reasoning_gym": "chain_sum"}]},
        "debug": {"schedule": schedule},
        "rollout": {
            "mode": "sequential",
            "rollout_batch_size": 4,
            "n_samples_per_prompt": LEAVES,
            "max_response_len": 8,
            "stop": {"eos_token_ids": [END_TOKEN], "answer_box": False, "repetition_window": 0},
            "timeout_s": 60,
            **rollout,
        },
    }
    return parse_config(raw)


def prompts(count: int) -> list[Prompt]:
    """Prompts whose number, their answer, is 0 to 3."""
    rng = random.Random(11)
    return [Prompt(f"p{place}", "", [1, 2], str(rng.choice("00123")), "exact", "test") for place in range(count)]


class FakeTokenizer:
    """Tokens are said as numbers."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Meeting(Protocol):
    """A barrier."""

    def wait(self) -> Any: ...


class FakeEngine:
    """Every step ends some of the requests, at least one; which, says `rng`."""

    hf_dir = Path("none")
    vocab_size = 16
    max_model_len = 1024
    kv_blocks = 10_000

    def __init__(self, rng: random.Random, long: float = 0.0) -> None:
        self.long = long
        """Share of the segments that do not end their path."""
        self.lockstep: Meeting | None = None
        """Where the ranks of one engine meet in each step."""
        self.at_step: tuple[int, Callable[[], None]] | None = None
        """What happens in a certain step."""
        self.rng = rng
        self.steps = 0
        self.running: dict[str, SegmentRequest] = {}

    def submit(self, request: SegmentRequest) -> SegmentStream:
        self.running[request.name] = request
        return SegmentStream(request, lambda: self.running.pop(request.name, None))

    def step(self) -> list[Finished]:
        self.steps += 1
        if self.lockstep is not None:
            self.lockstep.wait()
        if self.at_step is not None and self.steps == self.at_step[0]:
            self.at_step[1]()
        names = self.rng.sample(sorted(self.running), self.rng.randint(1, len(self.running)))
        return [self.finish(self.running.pop(name)) for name in names]

    def finish(self, request: SegmentRequest) -> Finished:
        if random.Random(f"{request.seed} long").random() < self.long:
            drawn = random.Random(request.seed)
            tokens = [drawn.randrange(4) for _ in range(request.max_tokens)]
            return Finished(request.name, tokens, [-drawn.random() for _ in tokens], "length", 0)
        drawn = random.Random(request.seed)
        tokens = [drawn.randrange(4), END_TOKEN]
        return Finished(request.name, tokens, [-drawn.random(), -0.5], "stop", 0)

    def abort(self) -> None:
        self.running.clear()

    def reset_prefix_cache(self) -> None:
        pass


class FakePool:
    """Gradings end when `rng` says so: a `share` of them at each look; others once they are waited for."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self.rng = rng
        self.share = share
        self.flying: dict[int, RewardItem] = {}
        self.tickets = 0

    def submit(self, items: Sequence[RewardItem]) -> list[int]:
        tickets = list(range(self.tickets, self.tickets + len(items)))
        self.tickets += len(items)
        self.flying |= dict(zip(tickets, items, strict=True))
        return tickets

    def poll(self, share: float | None = None) -> dict[int, RewardResult]:
        ended = [ticket for ticket in self.flying if self.rng.random() < (self.share if share is None else share)]
        self.rng.shuffle(ended)
        return {ticket: right(self.flying.pop(ticket)) for ticket in ended}

    def wait(self) -> dict[int, RewardResult]:
        return self.poll(1.0)

    def wait_any(self) -> dict[int, RewardResult]:
        found: dict[int, RewardResult] = {}
        while self.flying and not found:
            found = self.poll(0.3)
        return found

    def abandon(self) -> None:
        self.flying.clear()

    def take_costs(self) -> dict[str, int]:
        return {}

    def take_tally(self) -> dict[str, Any]:
        return {"total": self.tickets, "lost": {}, "reasons": {}}


def right(item: RewardItem) -> RewardResult:
    """Whether the answer's token is below the prompt's number."""
    return RewardResult(float(int(item.solution_str.split()[0]) < int(item.ground_truth)), None, {})


def fake_generator(cfg: Config, seed: int = 0) -> Generator:
    """The real generator on a fake engine."""
    engine = FakeEngine(random.Random(seed), long=0.5 if cfg.rollout.partial_rollout else 0.0)
    return Generator(engine, cfg, FakeTokenizer())  # type: ignore[arg-type]


def fake_collector(cfg: Config, seed: int, share: float) -> Collector:
    """The real collector on a fake engine and fake graders; `seed` says what ends when."""
    pool = FakePool(random.Random(seed), share)
    cursor = PromptCursor(prompts(PROMPTS), seed=0, shuffle=True)
    return Collector(cfg, fake_generator(cfg, seed), pool, cursor, Timers())  # type: ignore[arg-type]


def state_of(collector: Collector) -> str:
    """What a checkpoint keeps of a collector (saves.py), on rank 0. Collective over all ranks."""
    costs = collector.generator.costs.state_dict()
    return json.dumps([collector.cursor.state_dict(), collector.waiting(), costs])


def load(collector: Collector, state: str) -> None:
    """The inverse of `state_of`."""
    cursor, waiting, costs = json.loads(state)
    collector.restore(waiting)
    collector.cursor.load_state_dict(cursor)
    collector.generator.costs.load_state_dict(costs)


def everywhere(trees: Sequence[Tree]) -> list[dict[str, Any]]:
    """Whole trees as dicts, on every rank, in order. Collective over all ranks."""
    own = [[i, tree.to_dict()] for i, tree in enumerate(trees) if (tree.home or 0) == dist.rank()]
    told = dist.tell_all(own or None)
    whole = {index: tree for of_rank in told.values() for index, tree in of_rank}
    return [whole[index] for index in range(len(trees))]


def said(forests: Sequence[Forest]) -> list[Any]:
    """Trees and metrics, without what depends on time; as JSON gives it back. Collective over all ranks."""
    made = [
        [
            everywhere(forest.trees),
            {name: value for name, value in forest.metrics.items() if not depends_on_time(name)},
        ]
        for forest in forests
    ]
    return json.loads(json.dumps(made))
