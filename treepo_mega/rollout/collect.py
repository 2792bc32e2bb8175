"""One rollout step over all ranks: deal prompts to engines, sample, grade, exchange, keep what teaches.

Sampling and grading are `rollout/round.py`'s. Afterwards every rank holds the same list of trees, so filtering,
advantages and packing are computed alike everywhere, without messages.

Dynamic sampling (DAPO): a prompt whose rewards (or verdicts: `rollout.filter_metric`) are all equal has no signal and
is dropped; or a plug-in says which are. New prompts are drawn to replace it, `rollout.oversample` times as many as are
missing, at most `rollout.max_refills` times. A step that is not full then goes on with fewer and says so, or ends the
run (`rollout.allow_smaller_batch`).

Adaptive leaves (`rollout.leaves`): trees begin with a handful of leaves, and those whose rewards differ grow on in a
last round, with the leaves that settled prompts do not need (`adaptive.py`).

Partial rollouts: a tree with paths that reach beyond the step (`rollout.partial_rollout`) is carried over, as a state
that every rank holds and a checkpoint keeps; the next step goes on with it in place of a new prompt.
"""

from __future__ import annotations

import logging
import math
import operator
from dataclasses import asdict, dataclass, field
from typing import Any

from treepo_mega.config import Config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.lost import report_lost
from treepo_mega.data.rewards.returned import REMOTE_COSTS
from treepo_mega.errors import TreepoError
from treepo_mega.monitor.timers import Timers
from treepo_mega.plugins import plugin_keeps
from treepo_mega.rollout.adaptive import LeafBudget
from treepo_mega.rollout.counts import SAMPLING_COUNTS, summarize
from treepo_mega.rollout.eval import CORRECT
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.jobs import Job
from treepo_mega.rollout.round import sample_and_grade
from treepo_mega.rollout.shaping import reward_leaves, without_cut
from treepo_mega.runtime import dist
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.advantage import has_signal
from treepo_mega.tree.descent import fair_leaves, policy_mean
from treepo_mega.tree.diversity import common_tokens, distinct_responses, effective_samples
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.regrow import with_grades

logger = logging.getLogger(__name__)

LOOK_ALIKES = ("look_alikes", "look_alike_tokens")
SUM = "sum of "
COUNT = "count of "


class BatchNotFilled(TreepoError):
    """A step has fewer prompts with signal than its batch; the message says how many, and which keys decide."""


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
        self.cfg = cfg
        self.generator = generator
        self.pool = pool
        self.cursor = cursor
        self.timers = timers
        self.carried: list[dict[str, Any]] = []
        """Unfinished trees with their prompts, JSON-safe, the same on every rank; part of a checkpoint."""
        self._engine_of: dict[str, int] = {}
        """Prompt id -> the engine that sampled its tree in this step."""

    def collect(self, step: int) -> Forest:
        """Trees of `rollout_batch_size` prompts with signal (all prompts without dynamic sampling).

        Raises BatchNotFilled on every rank when there are fewer and `rollout.allow_smaller_batch` is off, and
        RewardsLostError when no reward could be graded.
        """
        rollout = self.cfg.rollout
        wanted = rollout.rollout_batch_size
        kept: list[Tree] = []
        seen: list[Tree] = []
        drawn: dict[str, Prompt] = {}
        # Emptied here and not by a round: a tree of any round of the step may grow on.
        self._engine_of = {}
        totals: dict[str, float] = {}
        budget = LeafBudget.of(rollout) if rollout.leaves == "adaptive" else None
        first = None if budget is None else budget.first
        resumed = self.carried[:wanted]
        self.carried = self.carried[wanted:]
        jobs = [Job(Prompt(**carried["prompt"]), carried["state"]) for carried in resumed]
        rounds = 1 + (rollout.max_refills if rollout.dynamic_sampling else 0)
        for refill in range(rounds):
            # A paused tree keeps its place in the batch: if each were replaced, they could pile up from step to step.
            missing = wanted - len(kept) - len(self.carried) - len(jobs)
            count = draws(missing, rollout.oversample)
            count = count if budget is None else budget.begin(count, len(kept))
            jobs += [Job(prompt, leaves=first) for prompt in self.cursor.take(count)]
            # All ranks see the same trees and leave the loop together: sampling is collective.
            if not jobs:
                break
            drawn |= {job.prompt.id: job.prompt for job in jobs}
            trees, counts = self.sample(jobs, step)
            add_counts(totals, counts | {"refills": float(refill > 0)})
            seen += trees
            chosen = [tree for tree in self._trainable(trees) if self._teaches(tree, step)]
            if is_function_path(rollout.filter_metric):
                what = f"filter plug-in {rollout.filter_metric!r} (rollout.filter_metric)"
                dist.require_agreement([tree.prompt_id for tree in chosen], what)
            kept += chosen
            jobs = []
        surplus = max(0, len(kept) - wanted)
        # The first drawn stay, not the first finished: choosing by speed would favour short responses.
        kept = kept[:wanted]
        asked = len(seen) * rollout.n_samples_per_prompt
        if budget is not None:
            seen, kept = self._grow_on(seen, kept, drawn, budget, totals, step)
            asked = wanted * rollout.n_samples_per_prompt - budget.left
        report_lost(self.pool.take_tally(), f"step {step}")
        # Leaves that went to other prompts of the step are not missing.
        if budget is None or budget.left:
            self._check_filled(len(kept), totals["refills"], step)
        totals |= {"resumed": len(resumed), "carried": len(self.carried), "surplus": surplus, "asked": asked}
        totals["unspent"] = 0 if budget is None else budget.left
        return Forest(kept, _metrics(seen, kept, totals, self.cfg, step))

    def _grow_on(
        self,
        seen: list[Tree],
        kept: list[Tree],
        drawn: dict[str, Prompt],
        budget: LeafBudget,
        totals: dict[str, float],
        step: int,
    ) -> tuple[list[Tree], list[Tree]]:
        """`seen` and `kept` after those of `kept` whose rewards differ have got the leaves that are left."""
        by_prompt = {tree.prompt_id: tree for tree in seen}
        mixed = [tree.prompt_id for tree in kept if self._differs(tree, step)]
        jobs = [
            Job(drawn[name], leaves=budget.first + more, begun=by_prompt[name])
            for name, more in zip(mixed, budget.share(len(mixed)), strict=True)
            if more
        ]
        if not jobs:
            return seen, kept
        trees, counts = self.sample(jobs, step)
        add_counts(totals, counts)
        grown = {tree.prompt_id: tree for tree in trees}
        trained = {tree.prompt_id: tree for tree in self._trainable(trees)}
        return [grown.get(tree.prompt_id, tree) for tree in seen], [trained.get(tree.prompt_id, tree) for tree in kept]

    def _teaches(self, tree: Tree, step: int) -> bool:
        """Whether the step keeps a tree that has leaves."""
        return not self.cfg.rollout.dynamic_sampling or self._differs(tree, step)

    def _differs(self, tree: Tree, step: int) -> bool:
        """Whether a tree has signal, by rollout.filter_metric."""
        rollout = self.cfg.rollout
        if is_function_path(rollout.filter_metric):
            return plugin_keeps(rollout.filter_metric, tree, step=step)
        return len(set(tree.verdicts)) > 1 if rollout.filter_metric == "acc" else has_signal(tree)

    def _check_filled(self, trained: int, refills: float, step: int) -> None:
        """Say that the step has fewer prompts than the batch, or raise BatchNotFilled; all ranks see the same."""
        if trained + len(self.carried) >= self.cfg.rollout.rollout_batch_size:
            return
        message = shortage(trained, len(self.carried), int(refills), self.cfg, step)
        if not self.cfg.rollout.allow_smaller_batch:
            raise BatchNotFilled(f"{message}, or set rollout.allow_smaller_batch=true to train on fewer")
        if dist.rank() == 0:
            logger.warning("%s. The step goes on with %d", message, trained)

    def _trainable(self, trees: list[Tree]) -> list[Tree]:
        """The trees with leaves, without those that count nothing (algo.leaf_weight, algo.mask_truncated_samples)."""
        fair = self.cfg.algo.leaf_weight == "descent"
        counted = [fair_leaves(tree) if fair else tree for tree in trees]
        if self.cfg.algo.mask_truncated_samples:
            counted = [without_cut(tree) for tree in counted]
        return [tree for tree in counted if tree.leaves]

    def sample(self, jobs: list[Job], step: int) -> tuple[list[Tree], dict[str, float]]:
        """Graded finished trees of `jobs`, in order, and counts, on every rank; paused trees go to `carried`.

        Counts `SUM + name` and `COUNT + name`: of the numbers that verifiers gave beside their scores.
        """
        expected = [self.generator.costs.expected(job.prompt) for job in jobs]
        sampled = sample_and_grade(
            self.generator,
            self.pool,
            jobs,
            lambda tree, texts, results: reward_leaves(tree, results, self.cfg),
            name=f"step {step}",
            costs=expected,
            step=step,
            policy_version=step,
            timers=self.timers,
            engines=[self._engine_of[job.prompt.id] for job in jobs] if jobs[0].begun else None,
        )
        self._engine_of |= {jobs[index].prompt.id: engine for index, engine in sampled.engines.items()}
        for index, state in sampled.paused.items():
            self.carried.append({"prompt": asdict(jobs[index].prompt), "state": state})
        trees = [with_earlier_grades(jobs[index], row) for index, row in sampled.rows.items()]
        # Learnt from all trees on every rank: with other costs, ranks would deal other lists.
        self.generator.costs.update([jobs[index].prompt for index in sampled.rows], trees)
        counts = dict(sampled.counts)
        counts["lost"] = float(sum(row["lost"] for row in sampled.rows.values()))
        for row in sampled.rows.values():
            for name, (total, count) in row["numbers"].items():
                counts[SUM + name] = counts.get(SUM + name, 0.0) + total
                counts[COUNT + name] = counts.get(COUNT + name, 0.0) + count
        counts["idle_share_max"] = sampled.idle_share_max
        return trees, counts


def with_earlier_grades(job: Job, row: dict[str, Any]) -> Tree:
    """The tree of a row; one that grew on has its first leaves and their grades again."""
    tree = Tree.from_dict(row["tree"])
    return tree if job.begun is None else with_grades(tree, job.begun)


def add_counts(totals: dict[str, float], counts: dict[str, float]) -> None:
    """Add what a round cost to the step's totals; of idle_share_max the largest."""
    for name, value in counts.items():
        both = max if name == "idle_share_max" else operator.add
        totals[name] = both(totals.get(name, 0.0), value)


def draws(missing: int, oversample: float) -> int:
    """Prompts to draw when `missing` are missing.

    >>> draws(10, 1.0), draws(10, 1.1), draws(3, 1.5), draws(-2, 3.0)
    (10, 11, 5, 0)
    """
    # Rounded before: 10 * 1.1 is a little more than 11.
    return math.ceil(round(max(0, missing) * oversample, 6))


def shortage(trained: int, carried: int, refills: int, cfg: Config, step: int) -> str:
    """Why a step has fewer prompts than its batch and what to change, without a full stop."""
    rollout = cfg.rollout
    wanted = rollout.rollout_batch_size
    held = f" and {carried} were carried over" if carried else ""
    if not rollout.dynamic_sampling:
        return (
            f"step {step}: {trained} of {wanted} prompts (rollout.rollout_batch_size) have leaves to train on{held}: "
            "the others lost all of theirs; rollout/ and reward/ metrics say to what. Mend the verifier, or raise "
            "rollout.max_response_len"
        )
    passed = "have rewards that differ"
    if rollout.filter_metric != "reward":
        passed = "have verdicts (rollout.filter_metric acc) that differ"
    if is_function_path(rollout.filter_metric):
        passed = f"were kept by {rollout.filter_metric} (rollout.filter_metric)"
    return (
        f"step {step}: {trained} of {wanted} prompts (rollout.rollout_batch_size) {passed}{held}, "
        f"after {refills} refills (rollout.max_refills {rollout.max_refills}, rollout.oversample "
        f"{rollout.oversample:g}). Choose prompts that are neither too easy nor too hard, raise rollout.oversample, "
        "rollout.max_refills or rollout.n_samples_per_prompt"
    )


def _leaves_per_prompt(trees: list[Tree]) -> dict[str, float]:
    """The fewest, the mean and the most leaves of trees that are trained on."""
    leaves = [len(tree.leaves) for tree in trees] or [0]
    return {
        "tree/leaves_per_prompt_min": min(leaves),
        "tree/leaves_per_prompt_mean": sum(leaves) / len(leaves),
        "tree/leaves_per_prompt_max": max(leaves),
    }


def _diversity(trees: list[Tree]) -> dict[str, float]:
    """How different the leaves of a tree are (see `tree/diversity.py`)."""
    leaves = sum(len(tree.leaves) for tree in trees)
    common = [common_tokens(tree) for tree in trees]
    return {
        "tree/distinct_share": sum(map(distinct_responses, trees)) / max(1, leaves),
        "tree/effective_samples": sum(map(effective_samples, trees)) / max(1, len(trees)),
        "tree/divergence_depth": sum(tokens for tokens, _ in common) / max(1, sum(pairs for _, pairs in common)),
    }


def _metrics(seen: list[Tree], kept: list[Tree], totals: dict[str, float], cfg: Config, step: int) -> dict[str, float]:
    """The `rollout/`, `tree/` and `reward/` lines of the step (see monitor/registry.py)."""
    counts = summarize(seen)
    rewards = [reward for tree in seen for reward in tree.rewards]
    verdicts = [verdict for tree in seen for verdict in tree.verdicts]
    masks = cfg.algo.mask_truncated_samples
    lengths = [tree.response_length(leaf) for tree in seen for leaf in tree.leaves] or [0]
    depths = [tree.nodes[leaf].depth for tree in seen for leaf in tree.leaves] or [0]
    trained = [reward for tree in kept for reward in tree.rewards]
    leaves = max(1.0, counts["leaves"])
    stale = sum(len(node.tokens) for tree in kept for node in tree.nodes[1:] if node.policy_version < step)
    out = {
        "rollout/reward_mean": sum(rewards) / max(1, len(rewards)),
        "rollout/accuracy": sum(verdict > CORRECT for verdict in verdicts) / max(1, len(verdicts)),
        "rollout/reward_policy": policy_mean(seen, lambda tree, index: tree.rewards[index]),
        "rollout/accuracy_policy": policy_mean(seen, lambda tree, index: float(tree.verdicts[index] > CORRECT)),
        "rollout/response_len_policy": policy_mean(seen, lambda tree, index: tree.response_length(tree.leaves[index])),
        "rollout/response_len_mean": sum(lengths) / len(lengths),
        "rollout/response_len_max": max(lengths),
        "rollout/truncated_share": (counts["stop/length"] + counts["stop/depth"]) / leaves,
        "rollout/leaves_masked": counts["stop/length"] + counts["stop/depth"] if masks else 0.0,
        "rollout/prompts_trained": len(kept),
        "rollout/prompts_surplus": totals["surplus"],
        "rollout/prompts_dropped_zero_std": len(seen) - len(kept) - totals["surplus"],
        "rollout/refills": totals["refills"],
        "rollout/engine_steps": totals["engine_steps"],
        "rollout/running_mean": totals["running"] / max(1.0, totals["engine_steps"]),
        "rollout/engine_idle_share": totals["idle_s"] / max(1e-9, totals["engine_s"]),
        "rollout/engine_idle_share_max": totals["idle_share_max"],
        "rollout/prompts_stolen": totals["stolen"],
        "rollout/trees_resumed": totals["resumed"],
        "rollout/trees_carried_over": totals["carried"],
        "rollout/stale_token_share": stale / max(1, sum(tree.unique_tokens() for tree in kept)),
        "tree/depth_mean": sum(depths) / len(depths),
        "tree/depth_max": max(depths),
        "tree/prompt_tokens": sum(len(tree.nodes[ROOT].tokens) for tree in seen),
        "tree/flat_prompt_tokens": sum(len(tree.nodes[ROOT].tokens) * len(tree.leaves) for tree in seen),
        "tree/leaves": sum(len(tree.leaves) for tree in kept),
        **_leaves_per_prompt(kept),
        "rollout/leaves_unspent": totals["unspent"],
        "tree/shortfall": totals["asked"] - counts["leaves"],
        **_diversity(seen),
        "tree/budget_divergence": counts.get("budget_divergence", 0.0) / max(1.0, counts.get("budget_decisions", 0.0)),
        "tree/budget_temperature": cfg.rollout.budget_temperature_at(step / max(1, cfg.train.num_rollouts - 1)),
        "reward/lost": totals["lost"],
        "reward/overlapped_share": totals["gradings_early"] / max(1.0, totals["gradings"]),
        "reward/mean": sum(trained) / max(1, len(trained)),
    }
    for name in (key.removeprefix(SUM) for key in totals if key.startswith(SUM)):
        out[f"reward/{name}"] = totals[SUM + name] / totals[COUNT + name]
    out |= {f"reward/{name}": totals[name] for name in REMOTE_COSTS if name in totals}
    for name in SAMPLING_COUNTS:
        out[f"rollout/{name}"] = counts.get(name, 0.0)
    for name in ("token_ratio", "unique_tokens", "flat_tokens", "fallbacks", "forks", "duplicates", *LOOK_ALIKES):
        out[f"tree/{name}"] = counts.get(name, 0.0)
    out["tree/fork_uncertainty_mean"] = counts.get("fork_uncertainty", 0.0) / max(1.0, counts.get("forks", 0.0))
    for reason in ("eos", "answer", "length", "depth", "repetition"):
        out[f"tree/stop_{reason}"] = counts[f"stop/{reason}"]
    return {name: float(value) for name, value in out.items()}
