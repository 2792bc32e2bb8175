"""One rollout step over all ranks: deal prompts to engines, sample, grade, exchange, keep what teaches.

Prompts are dealt to engines by expected cost, and an engine that runs dry takes from the others' lists
(`rollout/dealing.py`); a tree lives on one engine, and the ranks of that engine sample it together. Finished trees,
already graded, are exchanged as JSON, so that afterwards every rank holds the same list and what follows (filtering,
advantages, packing) is computed alike everywhere, without messages.

Dynamic sampling (DAPO): a prompt whose rewards are all equal has no signal and is dropped; new prompts are
drawn to replace it, at most `max_refills` times, after which the step goes on with fewer.

Partial rollouts: a tree with paths that reach beyond the step (`rollout.partial_rollout`) is carried over, as a state
that every rank holds and a checkpoint keeps; the next step goes on with it in place of a new prompt.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from treepo_mega.config import Config
from treepo_mega.data.prompts import Prompt, PromptCursor
from treepo_mega.data.rewards import RewardItem, RewardPool
from treepo_mega.data.rewards.lost import report_lost
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.eval import CORRECT
from treepo_mega.rollout.generator import Generator, Job, summarize
from treepo_mega.rollout.round import open_round
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
        self.carried: list[dict[str, Any]] = []
        """Unfinished trees with their prompts, JSON-safe, the same on every rank; part of a checkpoint."""

    def collect(self, step: int) -> Forest:
        """Trees of `rollout_batch_size` prompts with signal (all prompts without dynamic sampling)."""
        r = self.cfg.rollout
        kept: list[Tree] = []
        seen: list[Tree] = []
        totals: dict[str, float] = {}
        waited: list[float] = []
        resumed, self.carried = self.carried[: r.rollout_batch_size], self.carried[r.rollout_batch_size :]
        jobs = [Job(Prompt(**c["prompt"]), c["state"]) for c in resumed]
        rounds = 1 + (r.max_refills if r.dynamic_sampling else 0)
        for refill in range(rounds):
            missing = r.rollout_batch_size - len(kept) - len(self.carried) - len(jobs)
            jobs += [Job(p) for p in self.cursor.take(max(0, missing))]
            if not jobs:
                break
            trees, counts = self.sample(jobs, step)
            waited.append(counts.pop("idle_share_max"))
            totals = {name: totals.get(name, 0.0) + value for name, value in counts.items()}
            totals["refills"] = refill
            seen += trees
            kept += [t for t in trees if t.leaves and (not r.dynamic_sampling or has_signal(t))]
            jobs = []
        report_lost(self.pool.take_tally(), f"step {step}")
        totals |= {"resumed": len(resumed), "carried": len(self.carried), "idle_share_max": max(waited)}
        return Forest(kept, _metrics(seen, kept, totals, self.cfg, step))

    def sample(self, jobs: list[Job], step: int) -> tuple[list[Tree], dict[str, float]]:
        """Graded finished trees of `jobs`, in order, and counts, on every rank; paused trees go to `carried`."""
        started = time.monotonic()
        costs = [self.generator.costs.expected(job.prompt) for job in jobs]
        queue = open_round(self.cfg, costs, f"step {step}")
        with self.timers("rollout"):
            grown = self.generator.grow(jobs, queue, step=step, policy_version=step)
            busy = time.monotonic() - started
            dist.barrier("generation", self.cfg.rollout.timeout_s)
            whole = time.monotonic() - started
        with self.timers("reward"):
            speaks = dist.rank() % self.tp == 0
            mine = [(jobs[i].prompt, tree) for i, tree in grown.trees.items()]
            lost = self._grade([p for p, _ in mine], [t for _, t in mine]) if speaks else 0
            finished = [(i, tree.to_dict()) for i, tree in grown.trees.items()]
            told = dist.gather_objects([finished, list(grown.paused.items())] if speaks else [[], []])
        trees = {i: Tree.from_dict(t) for part, _ in told for i, t in part}
        paused = {i: state for _, part in told for i, state in part}
        self.carried += [{"prompt": asdict(jobs[i].prompt), "state": paused[i]} for i in sorted(paused)]
        done = sorted(trees)
        self.generator.costs.update([jobs[i].prompt for i in done], [trees[i] for i in done])
        idle = {"idle_s": whole - busy, "engine_s": whole}
        counts = {name: self.generator.counts[name] for name in ("engine_steps", "running")}
        counts |= {"lost": float(lost), "stolen": float(queue.stolen), **idle}
        counts = dist.sum_over_ranks(counts if speaks else dict.fromkeys(counts, 0.0))
        most = dist.max_over_ranks({"idle_share_max": (whole - busy) / max(whole, 1e-9)})
        return [trees[i] for i in done], counts | most

    def _grade(self, prompts: list[Prompt], trees: list[Tree]) -> int:
        """Write rewards into `trees`; returns how many could not be graded (their leaves are taken out)."""
        items = [
            RewardItem(p.verifier, p.data_source, self.generator.decode(t.response(leaf)), p.answer, p.extra)
            for p, t in zip(prompts, trees, strict=True)
            for leaf in t.leaves
        ]
        results = iter(self.pool.score(items)) if items else iter(())
        return sum(set_rewards(t, [next(results).score for _ in t.leaves]) for t in trees)


def _metrics(seen: list[Tree], kept: list[Tree], totals: dict[str, float], cfg: Config, step: int) -> dict[str, float]:
    """The `rollout/`, `tree/` and `reward/` lines of the step (see monitor/registry.py)."""
    counts = summarize(seen)
    rewards = [x for t in seen for x in t.rewards]
    lengths = [len(t.response(leaf)) for t in seen for leaf in t.leaves] or [0]
    depths = [t.nodes[leaf].depth for t in seen for leaf in t.leaves] or [0]
    trained = [x for t in kept for x in t.rewards]
    leaves = max(1.0, counts["leaves"])
    stale = sum(len(n.tokens) for t in kept for n in t.nodes[1:] if n.policy_version < step)
    out = {
        "rollout/reward_mean": sum(rewards) / max(1, len(rewards)),
        "rollout/accuracy": sum(x > CORRECT for x in rewards) / max(1, len(rewards)),
        "rollout/response_len_mean": sum(lengths) / len(lengths),
        "rollout/response_len_max": max(lengths),
        "rollout/truncated_share": (counts["stop/length"] + counts["stop/depth"]) / leaves,
        "rollout/prompts_dropped_zero_std": len(seen) - len(kept),
        "rollout/refills": totals["refills"],
        "rollout/engine_steps": totals["engine_steps"],
        "rollout/running_mean": totals["running"] / max(1.0, totals["engine_steps"]),
        "rollout/engine_idle_share": totals["idle_s"] / max(1e-9, totals["engine_s"]),
        "rollout/engine_idle_share_max": totals["idle_share_max"],
        "rollout/prompts_stolen": totals["stolen"],
        "rollout/trees_resumed": totals["resumed"],
        "rollout/trees_carried_over": totals["carried"],
        "rollout/stale_token_share": stale / max(1, sum(t.unique_tokens() for t in kept)),
        "tree/depth_mean": sum(depths) / len(depths),
        "tree/depth_max": max(depths),
        "tree/leaves": sum(len(t.leaves) for t in kept),
        "tree/shortfall": len(seen) * cfg.rollout.n_samples_per_prompt - counts["leaves"],
        "tree/budget_temperature": cfg.rollout.budget_temperature_at(step / max(1, cfg.train.num_rollouts - 1)),
        "reward/lost": totals["lost"],
        "reward/mean": sum(trained) / max(1, len(trained)),
    }
    for name in ("generated_tokens", "dropped_tokens", "cached_tokens", "recomputed_tokens", "forwarded_tokens"):
        out[f"rollout/{name}"] = counts.get(name, 0.0)
    for name in ("token_ratio", "unique_tokens", "flat_tokens", "fallbacks", "duplicates"):
        out[f"tree/{name}"] = counts.get(name, 0.0)
    for reason in ("eos", "answer", "length", "depth", "repetition"):
        out[f"tree/stop_{reason}"] = counts[f"stop/{reason}"]
    return {k: float(v) for k, v in out.items()}
