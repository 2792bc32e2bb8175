"""One rollout step over all ranks: deal prompts to engines, sample, grade, exchange, keep what teaches.

Prompts are dealt round-robin to engines; a tree lives on one engine, and the ranks of that engine sample it
together. Finished trees, already graded, are exchanged as JSON, so that afterwards every rank holds the same
list and what follows (filtering, advantages, packing) is computed alike everywhere, without messages.

Dynamic sampling (DAPO): a prompt whose rewards are all equal has no signal and is dropped; new prompts are
drawn to replace it, at most `max_refills` times, after which the step goes on with fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from treepo_mega.config import Config
from treepo_mega.data.prompts import Prompt, PromptCursor
from treepo_mega.data.rewards import RewardItem, RewardPool
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.eval import CORRECT
from treepo_mega.rollout.generator import Generator, summarize
from treepo_mega.runtime import dist
from treepo_mega.tree.advantage import has_signal, set_rewards
from treepo_mega.tree.node import Tree


@dataclass(slots=True)
class Forest:
    """What a rollout step yields, the same on every rank. `trees` are kept for training, `metrics` cover all."""

    trees: list[Tree]
    metrics: dict[str, float] = field(default_factory=dict)


class Collector:
    """Samples and grades the prompts of a step. Collective: every rank calls `collect`."""

    def __init__(
        self, cfg: Config, generator: Generator, pool: RewardPool, cursor: PromptCursor, timers: Timers
    ) -> None:
        self.cfg, self.generator, self.pool, self.cursor, self.timers = cfg, generator, pool, cursor, timers
        self.tp = cfg.rollout.engine.tensor_parallel_size

    def collect(self, step: int) -> Forest:
        """Trees of `rollout_batch_size` prompts with signal (all prompts without dynamic sampling)."""
        r = self.cfg.rollout
        kept: list[Tree] = []
        seen: list[Tree] = []
        totals: dict[str, float] = {"refills": -1.0}
        while len(kept) < r.rollout_batch_size and totals["refills"] < (r.max_refills if r.dynamic_sampling else 0):
            totals["refills"] += 1
            trees, counts = self.sample(self.cursor.take(r.rollout_batch_size - len(kept)), step)
            for name, value in counts.items():
                totals[name] = totals.get(name, 0.0) + value
            seen += trees
            kept += [t for t in trees if t.leaves and (not r.dynamic_sampling or has_signal(t))]
        return Forest(kept, _metrics(seen, kept, totals, self.cfg))

    def sample(self, prompts: list[Prompt], step: int) -> tuple[list[Tree], dict[str, float]]:
        """Graded trees of `prompts`, in order, on every rank; and counts summed over engines."""
        engine = dist.rank() // self.tp
        engines = max(1, dist.world_size() // self.tp)
        mine = prompts[engine::engines]
        with self.timers("rollout"):
            trees = self.generator.rollout(mine, step=step, policy_version=step)
            dist.barrier("generation", self.cfg.rollout.timeout_s)
        with self.timers("reward"):
            speaks = dist.rank() % self.tp == 0
            lost = self._grade(mine, trees) if speaks else 0
            told = dist.gather_objects([t.to_dict() for t in trees] if speaks else [])
        steps = self.generator.counts["engine_steps"] if speaks else 0.0
        counts = dist.sum_over_ranks({"lost": float(lost), "engine_steps": float(steps)})
        by_id = {t["prompt_id"]: t for part in told for t in part}
        return [Tree.from_dict(by_id[p.id]) for p in prompts], counts

    def _grade(self, prompts: list[Prompt], trees: list[Tree]) -> int:
        """Write rewards into `trees`; returns how many could not be graded (their leaves are taken out)."""
        items = [
            RewardItem(p.verifier, p.data_source, self.generator.decode(t.response(leaf)), p.answer, p.extra)
            for p, t in zip(prompts, trees, strict=True)
            for leaf in t.leaves
        ]
        results = iter(self.pool.score(items)) if items else iter(())
        return sum(set_rewards(t, [next(results).score for _ in t.leaves]) for t in trees)


def _metrics(seen: list[Tree], kept: list[Tree], totals: dict[str, float], cfg: Config) -> dict[str, float]:
    """The `rollout/`, `tree/` and `reward/` lines of the step (see monitor/registry.py)."""
    counts = summarize(seen)
    rewards = [x for t in seen for x in t.rewards]
    lengths = [len(t.response(leaf)) for t in seen for leaf in t.leaves] or [0]
    depths = [t.nodes[leaf].depth for t in seen for leaf in t.leaves] or [0]
    trained = [x for t in kept for x in t.rewards]
    leaves = max(1.0, counts["leaves"])
    out = {
        "rollout/reward_mean": sum(rewards) / max(1, len(rewards)),
        "rollout/accuracy": sum(x > CORRECT for x in rewards) / max(1, len(rewards)),
        "rollout/response_len_mean": sum(lengths) / len(lengths),
        "rollout/response_len_max": max(lengths),
        "rollout/truncated_share": (counts["stop/length"] + counts["stop/depth"]) / leaves,
        "rollout/prompts_dropped_zero_std": len(seen) - len(kept),
        "rollout/refills": totals["refills"],
        "rollout/engine_steps": totals["engine_steps"],
        "tree/depth_mean": sum(depths) / len(depths),
        "tree/leaves": sum(len(t.leaves) for t in kept),
        "tree/shortfall": len(seen) * cfg.rollout.n_samples_per_prompt - counts["leaves"],
        "reward/lost": totals["lost"],
        "reward/mean": sum(trained) / max(1, len(trained)),
    }
    for name in ("generated_tokens", "cached_tokens", "recomputed_tokens"):
        out[f"rollout/{name}"] = counts.get(name, 0.0)
    for name in ("token_ratio", "unique_tokens", "flat_tokens", "fallbacks"):
        out[f"tree/{name}"] = counts.get(name, 0.0)
    for reason in ("eos", "answer", "length", "depth", "repetition"):
        out[f"tree/stop_{reason}"] = counts[f"stop/{reason}"]
    return {k: float(v) for k, v in out.items()}
