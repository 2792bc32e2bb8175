"""What trees over turns save: against independent multi-turn samples, and packed training against flat.

    python tools/bench/agent.py [--quick] [--repeats 2] [--prompts 8]

One process, one rank, fp32, a random model of 4 layers x 256: a real engine, a real environment in its worker
processes, the real actor. Trajectories have 2, 4 and 8 turns that a tool answers, and a last one. A turn has 32
tokens, an observation 32. Trees have 16 leaves and branch behind observations. Random weights call no tool, so a call
is made for each turn, and its last token is written over with an end of sequence; all tokens are sampled by the model.

    rollout     the project's generator with trees, and with mode sequential: both ask the tool as a run does
    training    the trees that were sampled, packed (`train.prefix_sharing: tree`) and one by one (`none`)

The two ways alternate. Last line, JSON: {"cases": [{"turns", "observation_share" (of the tokens of a trajectory),
"token_ratio" (tokens of the forest, prompts left out / of its trajectories), "rollout_vs_independent" (CPU seconds of
this process), "rollout_wall" (wall seconds), "tool_calls_ratio", "train_ratio" (tokens computed, packed / flat, prompts
included), "train_vs_flat" (CPU seconds), "grad_rel_diff", "rollout_met" (1.15 token_ratio), "train_met" (1.1
train_ratio + 0.03)}]}. --quick: 2 turns, 8 leaves, one repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

import tree_training as training
from treepo_mega.actor.update import Actor, Policy
from treepo_mega.config import Config, load_config
from treepo_mega.data.prompts import Prompt
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import Finished, SegmentRequest, SegmentStream
from treepo_mega.environment import ToolCall
from treepo_mega.environment.setup import Environment
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.turns import Agent
from treepo_mega.runtime import dist
from treepo_mega.tree.history import Observation
from treepo_mega.tree.node import Tree
from treepo_mega.tree.stop import TurnRules

MODEL = training.MODELS["4x256"]
EOS = MODEL["vocab_size"] - 1
TURN, OBSERVATION, PROMPT = 32, 32, 64
TURNS = (2, 4, 8)


class NoText:
    """Tokens of random weights say nothing."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Nothing."""
        return ""


class EveryTurnCalls(Agent):
    """An agent whose every turn calls the calculator, whatever its tokens are."""

    def __init__(self, environment: Environment, turns: int) -> None:
        self.environment = environment
        self.rules = TurnRules(turns, turns * OBSERVATION)

    def observation(self, tree: Tree, node_id: int, texts: Sequence[str]) -> Observation:
        """A fixed number of tokens, a function of what the tool said."""
        drawn = random.Random(" ".join(texts))
        return Observation([drawn.randrange(EOS) for _ in range(OBSERVATION)])

    def calls(self, turn: Sequence[int]) -> list[Any]:
        """One call; its number is that of the turn's tokens."""
        return [ToolCall("calculate", {"expression": f"{sum(turn)} + 1"})]


class EndingTurns:
    """The engine, whose segments all end their turn; changes nothing else."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, request: SegmentRequest) -> SegmentStream:
        """As the engine's, to the last token of the turn."""
        turn = min(TURN, request.max_tokens)
        return self.engine.submit(replace(request, stop_token_ids=[], max_tokens=turn, run=0, peek=0))

    def step(self) -> list[Finished]:
        """As the engine's; the last token of a segment is an end of sequence."""
        return [replace(each, tokens=[*each.tokens[:-1], EOS], finish_reason="stop") for each in self.engine.step()]


def configuration(hf: Path, turns: int, leaves: int, mode: str) -> Config:
    """One rank; segments are turns."""
    return load_config(
        None,
        [
            f"model.hf_checkpoint={hf}", "model.params_dtype=fp32", "data.train=[{path: unused.jsonl}]",
            "data.environment=calculator", "data.apply_chat_template=true", f"data.max_prompt_len={PROMPT}",
            f"environment.max_turns={turns}", f"environment.max_observation_len={turns * OBSERVATION}",
            f"rollout.mode={mode}", f"rollout.n_samples_per_prompt={leaves}", "rollout.rollout_batch_size=8",
            f"rollout.max_response_len={(turns + 1) * TURN}", f"rollout.segment.length={TURN}",
            f"rollout.stop.eos_token_ids=[{EOS}]", "rollout.stop.answer_box=false", "rollout.stop.repetition_window=0",
            "rollout.engine.block_size=32", "rollout.engine.kv_cache_memory_mb=512", "rollout.timeout_s=600",
            "train.max_tokens_per_gpu=4096", "environment.num_workers=1",
        ],
    )  # fmt: skip


def sample(engine: Engine, environment: Environment, cfg: Config, prompts: list[Prompt], turns: int) -> dict[str, Any]:
    """One rollout: its trees, seconds by both clocks, and the tool's calls."""
    generator = Generator(EndingTurns(engine), cfg, NoText())  # type: ignore[arg-type]
    generator.agent = EveryTurnCalls(environment, turns)
    cpu, wall = time.process_time(), time.perf_counter()
    trees = generator.rollout(prompts, step=0)
    return {
        "trees": trees,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "calls": sum(tree.counts["tool_calls"] for tree in trees),
    }


def tokens_of(trees: Sequence[Tree]) -> tuple[int, int, int]:
    """(tokens of the forest, of its trajectories one by one, observations among these); prompts are left out."""
    unique = sum(tree.unique_tokens() + tree.observation_tokens() for tree in trees)
    observed = sum(tree.observed_length(leaf) for tree in trees for leaf in tree.leaves)
    return unique, observed + sum(tree.flat_tokens() for tree in trees), observed


def train(sides: dict[str, training.Side], repeats: int) -> dict[str, Any]:
    """CPU seconds of old logprobs, reference and update, packed over flat, and how far their gradients are apart."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    gradients = {}
    for name, side in sides.items():  # warms up, too
        side.old()
        side.ref()
        gradients[name] = side.gradient()
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.process_time()
            side.old()
            side.ref()
            side.update()
            cpu[name].append(time.process_time() - began)
    apart = (gradients["tree"] - gradients["none"]).norm() / gradients["none"].norm()
    counts = {name: side.counts()["tokens"] for name, side in sides.items()}
    return {
        "train_ratio": counts["tree"] / counts["none"],
        "train_vs_flat": statistics.median(cpu["tree"]) / statistics.median(cpu["none"]),
        "grad_rel_diff": float(apart),
    }


def measure(turns: int, leaves: int, repeats: int, count: int, hf: Path, engine: Engine) -> dict[str, Any]:
    """One row of the table."""
    drawn = np.random.default_rng(3)
    prompts = [
        Prompt(f"p{i}", "", drawn.integers(EOS, size=PROMPT).tolist(), "", "exact", "bench", row={}, opening=None)
        for i in range(count)
    ]
    cfgs = {mode: configuration(hf, turns, leaves, mode) for mode in ("tree", "sequential")}
    environment = Environment("calculator", cfgs["tree"].environment, 1)
    environment.openings([(prompt.id, {}) for prompt in prompts])
    times: dict[str, list[dict[str, Any]]] = {mode: [] for mode in cfgs}
    for _ in range(repeats):
        for mode, cfg in cfgs.items():
            times[mode].append(sample(engine, environment, cfg, prompts, turns))
    environment.close()
    trees: list[Tree] = times["tree"][0]["trees"]
    unique, flat, observed = tokens_of(trees)

    def best(mode: str, clock: str) -> float:
        return min(float(run[clock]) for run in times[mode])

    for tree in trees:
        tree.rewards = drawn.choice([0.0, 1.0], size=len(tree.leaves)).tolist()
    row = {
        "turns": turns,
        "observation_share": observed / flat,
        "token_ratio": unique / flat,
        "rollout_vs_independent": best("tree", "cpu") / best("sequential", "cpu"),
        "rollout_wall": best("tree", "wall") / best("sequential", "wall"),
        "tool_calls_ratio": times["tree"][0]["calls"] / times["sequential"][0]["calls"],
    }
    training_cfg = {how: training.configuration(hf, how) for how in ("tree", "none")}
    actor, reference = Actor(training_cfg["tree"], hf), Policy(training_cfg["tree"], hf)
    sides = {how: training.Side(actor, reference, cfg, trees) for how, cfg in training_cfg.items()}
    row |= train(sides, repeats)
    row["rollout_met"] = row["rollout_vs_independent"] <= 1.15 * row["token_ratio"]
    row["train_met"] = row["train_vs_flat"] <= 1.1 * row["train_ratio"] + 0.03
    return row


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 turns, 8 leaves, one repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    rows = []
    columns = ("turns", "observation_share", "token_ratio", "rollout_vs_independent", "rollout_wall")
    columns += ("tool_calls_ratio", "train_ratio", "train_vs_flat", "grad_rel_diff")
    leaves, repeats = (8, 1) if args.quick else (16, args.repeats)
    with tempfile.TemporaryDirectory() as directory:
        hf = training.write_model(Path(directory) / "model", MODEL)
        longest = configuration(hf, 2 if args.quick else max(TURNS), leaves, "tree")
        dist.initialize(longest)
        engine = Engine(hf, longest)
        print("  ".join(f"{name:>22}" for name in columns))
        for turns in TURNS[:1] if args.quick else TURNS:
            rows.append(measure(turns, leaves, repeats, args.prompts, hf, engine))
            print("  ".join(f"{rows[-1][name]:>22.4g}" for name in columns), flush=True)
        print(json.dumps({"cases": rows}))
        dist.leave(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
