"""Where branches should start: the rules of branching against independent samples, on one model.

    python tools/bench/branching.py [--quick] [--config FILE] [--model DIR] [--prompts 32] [--repeats 3] [--rules ...]
    python tools/bench/branching.py --random               # the 22 M random weights of tools/bench/rollout.py

One engine, one process, the prompts of the configuration; no training. Each rule samples the same prompts through the
collector of a training step, the rules take turns, and the fastest of the repeats counts. The rules:

    independent              n samples a prompt
    border/equal             binary trees that branch at every border until they are full (the default)
    border/entropy           the same, divided by the entropy at the border
    bushy                    half of the leaves start at the prompt
    fork/again, fork/other   a quarter of the leaves are trunks; the others start where the trunks were uncertain,
                             by a free draw, or by a token that nobody has there
    fork/other, 3 waves      the same in three waves
    fork/few trunks          fork/other with half as many trunks, in two waves
    fork/threshold           by a threshold, as fair samples
    fork/adaptive            fork/other with `rollout.leaves: adaptive`

`distinct`: leaves whose response no other leaf of their tree has before it, per 1,000 forwarded tokens; `x border` is
that beside border/equal. `signal`: prompts whose rewards differ. `time`: seconds of sampling / those of independent;
`cpu` the same in CPU time, which other load on the machine disturbs less. `fwd/unique`: forwarded tokens / tokens of
the trees, prompts included. `cos`: of the mean gradient of a rule's leaves to the exact one, with the exact baseline,
on the process of tools/bench/estimators.py; all leaves count alike, those of fork/threshold by their descent.

Last line, JSON: {"model", "prompts", "leaves", "rules": [{"name", "tokens_per_leaf", "distinct_leaf_share",
"distinct_per_1k_tokens", "distinct_vs_border", "prompts_with_signal", "cos_exact", "rollout_time_ratio",
"rollout_cpu_ratio", "budget_divergence", "forwarded_over_unique", "leaves", "mean_reward"}]}. --quick: 8 prompts, one
repeat, 200 trees for the cosine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from transformers import AutoTokenizer

from estimators import LONGEST, Process, judge
from rollout import MODEL, make_model
from treepo_mega.config import Config, RolloutConfig, load_config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.rewards import RewardPool
from treepo_mega.engine.engine import Engine
from treepo_mega.monitor.progress import quieten_libraries
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.collect import Collector
from treepo_mega.rollout.generator import Generator

FORK = {"branching.at": "fork", "branching.fork.signal": "logprob"}
OTHER = FORK | {"branching.fork.draw": "other"}
COMPARED_WITH = ("independent", "border/equal")
"""Rules that are always sampled: the figures of the others are ratios to theirs."""


def rules(leaves: int) -> dict[str, dict[str, Any]]:
    """Keys of the section rollout by the name of a rule, for trees of so many leaves."""
    half = max(2, leaves // 2)
    few = max(1, leaves // 8)
    return {
        "independent": {"mode": "sequential"},
        "border/equal": {},
        "border/entropy": {"branching.budget.kind": "entropy"},
        "bushy": {"branching.initial": (half, half)},
        "fork/again": FORK,
        "fork/other": OTHER,
        "fork/other, 3 waves": OTHER | {"branching.fork.waves": 3},
        "fork/few trunks": OTHER | {"branching.fork.waves": 2, "branching.initial": (few, few)},
        "fork/threshold": OTHER
        | {"branching.fork.signal": "entropy", "branching.fork.threshold": 0.3, "fallback.from": "none"},
        "fork/adaptive": OTHER | {"leaves": "adaptive"},
    }


def sample(generator: Generator, cfg: Config, prompts: list[Prompt], pool: RewardPool) -> dict[str, float]:
    """What one rollout step under `cfg` gives and costs."""
    generator.cfg = cfg
    timers = Timers()
    collector = Collector(cfg, generator, pool, PromptCursor(prompts, seed=0, shuffle=False), timers)
    forest = collector.collect(0)
    spent = timers.pop()
    distinct = sum(len({tuple(tree.response(leaf)) for leaf in tree.leaves}) for tree in forest.trees)
    told = {prompt.id: len(prompt.tokens) for prompt in prompts}
    unique = sum(tree.unique_tokens() + told[tree.prompt_id] for tree in forest.trees)
    return {
        "seconds": spent["timing_s/rollout"],
        "cpu": spent["cpu_s/rollout"],
        "leaves": sum(len(tree.leaves) for tree in forest.trees),
        "distinct": distinct,
        "signal": sum(len(set(tree.rewards)) > 1 for tree in forest.trees) / len(forest.trees),
        "forwarded": forest.metrics["rollout/forwarded_tokens"],
        "unique": unique,
        "reward": forest.metrics["rollout/reward_mean"],
        "divergence": forest.metrics["tree/budget_divergence"],
    }


def cosine(changes: dict[str, Any], trees: int) -> float:
    """The cosine of the module docstring for the rule of `changes`."""
    base = RolloutConfig().replace({"segment.length": 1, "n_samples_per_prompt": 16, "max_response_len": LONGEST})
    # The process has three tokens and five steps: no room for a distance, and entropies of about one nat.
    rollout = base.replace({**changes, "branching.fork.distance": 1})
    if rollout.branching.fork.threshold is not None:
        rollout = rollout.replace({"branching.fork.threshold": 0.8})
    process = Process(stops=True, binary=True, seed=3)
    rng = random.Random(3)
    grown = [process.grow(rollout, rng) for _ in range(trees)]
    weight = "descent" if rollout.branching.fork.threshold is not None else "uniform"
    return judge(process, grown, "exact", weight)["cos"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The JSON of the last line."""
    cfg = load_config(args.config, [f"model.hf_checkpoint={args.model}"] if args.model else [])
    quieten_libraries()
    with tempfile.TemporaryDirectory() as directory:
        hf = Path(cfg.model.hf_checkpoint)
        if args.random:
            hf = random_model(hf, Path(directory))
        return compare(args, cfg, hf)


def random_model(like: Path, directory: Path) -> Path:
    """The random weights of tools/bench/rollout.py with the tokenizer and the vocabulary of the checkpoint `like`."""
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(like / file, directory / file)
    vocabulary = json.loads((like / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    make_model(directory, "fp32", MODEL | {"vocab_size": vocabulary})
    return directory


def compare(args: argparse.Namespace, cfg: Config, hf: Path) -> dict[str, Any]:
    """The rules on the checkpoint `hf`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(hf)
    prompts = list(load_prompts(cfg.data.train, cfg.data, tokenizer))[: args.prompts]
    generator = Generator(Engine(hf, cfg), cfg, tokenizer)
    leaves = cfg.rollout.n_samples_per_prompt
    # All prompts are looked at, not only those that would be trained on.
    whole = {"dynamic_sampling": False, "oversample": 1.0, "surplus": "drop"}
    chosen = {name: keys for name, keys in rules(leaves).items() if name in {*args.rules, *COMPARED_WITH}}
    best: dict[str, dict[str, float]] = {}
    with RewardPool(cfg.reward) as pool:
        # The first call of an engine is slow.
        for turn in range(args.repeats + 1):
            for name, changes in chosen.items():
                some = prompts[:2] if turn == 0 else prompts
                keys = {**whole, **changes, "rollout_batch_size": len(some)}
                under = cfg.model_copy(update={"rollout": cfg.rollout.replace(keys)})
                found = sample(generator, under, some, pool)
                if turn:
                    old = best.setdefault(name, found)
                    old["seconds"] = min(old["seconds"], found["seconds"])
                    old["cpu"] = min(old["cpu"], found["cpu"])
                print(f"{name}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    rows = [row(name, found, best) for name, found in best.items()]
    for one in rows:
        changes = chosen[one["name"]]
        # What adapts is how many leaves a prompt gets, which one process cannot show.
        one["cos_exact"] = cosine({k: v for k, v in changes.items() if k != "leaves"}, args.trees)
    return {"model": "random" if args.random else str(hf), "prompts": len(prompts), "leaves": leaves, "rules": rows}


def row(name: str, found: dict[str, float], best: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One rule's figures."""
    per_token = {rule: one["distinct"] / one["forwarded"] for rule, one in best.items()}
    return {
        "name": name,
        "tokens_per_leaf": found["forwarded"] / found["leaves"],
        "distinct_leaf_share": found["distinct"] / found["leaves"],
        "distinct_per_1k_tokens": 1000 * per_token[name],
        "distinct_vs_border": per_token[name] / per_token["border/equal"],
        "prompts_with_signal": found["signal"],
        "rollout_time_ratio": found["seconds"] / best["independent"]["seconds"],
        "rollout_cpu_ratio": found["cpu"] / best["independent"]["cpu"],
        "budget_divergence": found["divergence"],
        "forwarded_over_unique": found["forwarded"] / found["unique"],
        "leaves": found["leaves"],
        "mean_reward": found["reward"],
    }


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 prompts, one repeat, 200 trees for the cosine")
    parser.add_argument("--config", default="examples/tiny_cpu.yaml")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a checkpoint in place of the configuration's")
    which.add_argument("--random", action="store_true", help="22 M random weights with the configuration's tokenizer")
    names = list(rules(16))
    parser.add_argument("--rules", nargs="+", choices=names, default=names, metavar="RULE", help="; ".join(names))
    parser.add_argument("--prompts", type=int, help="32, with --quick 8")
    parser.add_argument("--repeats", type=int, help="3, with --quick 1")
    args = parser.parse_args()
    args.prompts = args.prompts or (8 if args.quick else 32)
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.trees = 200 if args.quick else 1500
    result = measure(args)
    head = f"{'rule':20}{'tokens/leaf':>12}{'distinct':>10}{'per 1k':>8}{'x border':>9}{'signal':>8}"
    print(f"{head}{'time':>7}{'cpu':>7}{'fwd/unique':>12}{'cos':>7}{'reward':>8}")
    for one in result["rules"]:
        print(
            f"{one['name']:20}{one['tokens_per_leaf']:12.1f}{one['distinct_leaf_share']:10.2f}"
            f"{one['distinct_per_1k_tokens']:8.1f}{one['distinct_vs_border']:9.2f}{one['prompts_with_signal']:8.2f}"
            f"{one['rollout_time_ratio']:7.2f}{one['rollout_cpu_ratio']:7.2f}{one['forwarded_over_unique']:12.3f}"
            f"{one['cos_exact']:7.3f}{one['mean_reward']:8.3f}"
        )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
