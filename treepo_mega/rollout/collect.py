"""One rollout step over all ranks: deal prompts to engines, sample, grade, exchange, keep what teaches.

Sampling and grading are `rollout/round.py`'s. Afterwards every rank holds the structure and the grades of the same list
of trees, so filtering, advantages and packing are computed alike everywhere. Their tokens stay where they were sampled.

Dynamic sampling (DAPO): a prompt without signal (`teaching.py`) is replaced at once by the next of the cursor, while
too few are found or in flight (`refill.py`). The step trains on the first `rollout_batch_size` in cursor order that
have signal. One that is not full goes on with fewer and says so, or ends the run (`rollout.allow_smaller_batch`).

Surplus (`rollout.oversample` > 1): what has signal beyond them is dropped, or trains first in the next step
(`rollout.surplus`); a checkpoint keeps it.

Adaptive leaves (`rollout.leaves`): trees begin with a handful of leaves, and those whose rewards differ grow on in a
last round, with the leaves that settled prompts do not need (`adaptive.py`).

Partial rollouts: a tree with paths that reach beyond the step (`rollout.partial_rollout`) is carried over, as a state
that the ranks of its engine hold; it keeps its place in the batch, and that engine goes on with it in the next step.
With adaptive leaves it keeps its allotment, which is taken off that step's leaves as well.

What waits for another step stays where it was sampled. A checkpoint brings it to rank 0 (`waiting`).
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treepo_mega.config import Config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rewards import RewardPool, RewardResult
from treepo_mega.data.rewards.lost import report_lost
from treepo_mega.data.rewards.returned import REMOTE_COSTS
from treepo_mega.errors import TreepoError
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.adaptive import LeafBudget
from treepo_mega.rollout.contents import waiting_at_main
from treepo_mega.rollout.counts import SAMPLING_COUNTS, summarize
from treepo_mega.rollout.durable import Durable
from treepo_mega.rollout.engine_costs import cost_metrics
from treepo_mega.rollout.eval import CORRECT
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.idleness import idle_shares
from treepo_mega.rollout.jobs import Job, grows_in_place, job_of, leaves_of
from treepo_mega.rollout.refill import RefillRule, Supply
from treepo_mega.rollout.report import TREE
from treepo_mega.rollout.round import sample_and_grade
from treepo_mega.rollout.shaping import CUT, reward_leaves
from treepo_mega.rollout.teaching import Teaches, counted, judge
from treepo_mega.rollout.turn_metrics import turn_metrics
from treepo_mega.runtime import dist
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.descent import policy_means
from treepo_mega.tree.diversity import independent_samples
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.stop import STOP_REASONS

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


@dataclass(frozen=True, slots=True)
class Graded:
    """A graded tree, whole, and what it is good for."""

    tree: Tree
    teaches: Teaches


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
        self.carried: list[Job] = []
        """Unfinished trees, the same on every rank but for their states, which are on the ranks of their engines."""
        self.surplus: list[Tree] = []
        """Graded trees that train in the next step, with the leaves alone that count; contents as in a `Forest`."""
        self.durable: Durable | None = None
        """Where finished trees are kept for a run that goes on after a kill; None: they are not."""
        self._engine_of: dict[str, int] = {}
        """Prompt id -> the engine that sampled its tree in this step."""

    def collect(self, step: int) -> Forest:
        """Trees of `rollout_batch_size` prompts with signal (all prompts without dynamic sampling).

        Raises BatchNotFilled on every rank when there are fewer and `rollout.allow_smaller_batch` is off, and
        RewardsLostError when no reward could be graded.
        """
        rollout = self.cfg.rollout
        wanted = rollout.rollout_batch_size
        # Emptied here and not by `sample`: a tree of the step may grow on.
        self._engine_of = {}
        older = self.surplus[:wanted]
        self.surplus = self.surplus[wanted:]
        goes_on = self.carried[: wanted - len(older)]
        self.carried = self.carried[wanted - len(older) :]
        budget = LeafBudget.of(rollout, goes_on) if rollout.leaves == "adaptive" else None
        # A paused tree keeps its place in the batch: if each were replaced, they could pile up from step to step.
        missing = wanted - len(older) - len(self.carried)
        supply, rule = self._supply(goes_on, missing, budget)
        begun = len(supply)
        graded, totals = self.sample(supply, step, rule)
        replaced = int(totals["prompts_begun"]) - begun
        self.cursor.take(replaced)
        seen = [each.tree for each in graded]
        taught = [counted(each.tree, self.cfg) for each in graded if each.teaches.trains]
        # The first drawn stay, not the first finished: choosing by speed would favour short responses.
        new = taught[: wanted - len(older)]
        surplus = taught[len(new) :]
        settled = [each.tree for each in graded if not each.teaches.differs]
        asked = {job.prompt.id: leaves_of(job, rollout) for job in supply}
        if budget is not None:
            budget.begin(begun + replaced)
            mixed = {each.tree.prompt_id for each in graded if each.teaches.differs}
            # A tree that was carried over while it grew has all that it is to have.
            jobs = {job.prompt.id: job for job in supply if job.begun is None and job.leaves is not None}
            growing = [jobs[tree.prompt_id] for tree in new if tree.prompt_id in mixed & jobs.keys()]
            shares = budget.share(len(growing))
            asked |= {job.prompt.id: budget.first + more for job, more in zip(growing, shares, strict=True)}
            seen, new = self._grow_on(seen, new, [(job.prompt, asked[job.prompt.id]) for job in growing], totals, step)
        if self.durable is not None:
            self.durable.end_step()
        report_lost(self.pool.take_tally(), f"step {step}")
        kept = older + new
        # Leaves that went to other prompts of the step are not missing.
        if budget is None or budget.left:
            self._check_filled(len(kept), replaced, step)
        if rollout.surplus == "carry":
            self.surplus += surplus
            wasted: list[Tree] = []
        else:
            wasted = surplus
        totals |= {"resumed": len(goes_on), "carried": len(self.carried), "surplus": len(surplus)}
        # A tree that is carried over is asked for where it ends.
        totals["asked"] = sum(asked[tree.prompt_id] for tree in seen)
        totals |= {"refills": replaced, "older": len(older), "unspent": 0 if budget is None else budget.left}
        totals["wasted"] = sum(tree.counts.get("generated_tokens", 0) for tree in wasted)
        totals |= saved_by_settling(settled if budget is not None else [], rollout.n_samples_per_prompt)
        return Forest(kept, _metrics(seen, kept, totals, self.cfg, step))

    def _supply(self, goes_on: Sequence[Job], missing: int, budget: LeafBudget | None) -> tuple[Supply, RefillRule]:
        """The jobs of a step of which `missing` places are free, and the rule by which more of them begin.

        `goes_on`: carried-over trees, which come first.
        """
        rollout = self.cfg.rollout
        first = None if budget is None else budget.first
        count = draws(missing - len(goes_on), rollout.oversample)
        if budget is not None:
            count = max(0, min(count, budget.left // budget.first - len(goes_on)))
        jobs = [*goes_on]
        jobs += [Job(prompt, leaves=first) for prompt in self.cursor.take(count)]
        refills = rollout.max_refills if rollout.dynamic_sampling else 0
        rule = RefillRule(begin=len(jobs), wanted=missing, most=len(jobs) * (1 + refills), leaves=budget)
        return Supply(jobs, self.cursor.lookahead(), first), rule

    def _grow_on(
        self,
        seen: list[Tree],
        kept: list[Tree],
        growing: Sequence[tuple[Prompt, int]],
        totals: dict[str, float],
        step: int,
    ) -> tuple[list[Tree], list[Tree]]:
        """`seen` and `kept` after those trees of `kept` have grown to so many leaves.

        Without those that are carried over while they grow: they train as a whole in a later step.
        """
        by_prompt = {tree.prompt_id: tree for tree in seen}
        jobs = [
            Job(prompt, leaves=leaves, begun=by_prompt[prompt.id])
            for prompt, leaves in growing
            if leaves > self.cfg.rollout.first_leaves
        ]
        if not jobs:
            return seen, kept
        graded, counts = self.sample(jobs, step)
        add_counts(totals, counts)
        grown = {each.tree.prompt_id: each.tree for each in graded}
        trained = {name: fair for name, tree in grown.items() if (fair := counted(tree, self.cfg)).leaves}
        paused = {job.prompt.id for job in jobs} - grown.keys()
        seen = [tree for tree in seen if tree.prompt_id not in paused]
        kept = [tree for tree in kept if tree.prompt_id not in paused]
        return [grown.get(tree.prompt_id, tree) for tree in seen], [trained.get(tree.prompt_id, tree) for tree in kept]

    def _check_filled(self, trained: int, refills: int, step: int) -> None:
        """Say that the step has fewer prompts than the batch, or raise BatchNotFilled; all ranks see the same."""
        if trained + len(self.carried) >= self.cfg.rollout.rollout_batch_size:
            return
        message = shortage(trained, len(self.carried), refills, self.cfg, step)
        if not self.cfg.rollout.allow_smaller_batch:
            raise BatchNotFilled(f"{message}, or set rollout.allow_smaller_batch=true to train on fewer")
        if dist.rank() == 0:
            logger.warning("%s. The step goes on with %d", message, trained)

    def sample(
        self, jobs: Sequence[Job], step: int, rule: RefillRule | None = None
    ) -> tuple[list[Graded], dict[str, float]]:
        """Graded finished trees of `jobs`, in order, and counts, on every rank; paused trees go to `carried`.

        `rule`: which jobs of a `Supply` begin in place of others; "prompts_begun" counts all that have begun. Counts
        `SUM + name` and `COUNT + name`: of the numbers that verifiers gave beside their scores. `Graded.teaches` of a
        tree that grew on is that of its first leaves.
        """
        kept = None if self.durable is None else self.durable.round(step, jobs, rule)
        begun = len(jobs) if kept is None else kept.begun
        expected = [self.generator.costs.expected(jobs[index].prompt) for index in range(begun)]
        # Trees grow on after grading because they have signal; of them the new leaves alone are graded now.
        grow_on = {job.prompt.id for job in jobs if job.begun}
        sampled = sample_and_grade(
            self.generator,
            self.pool,
            jobs,
            lambda tree, texts, results: self._make_row(tree, results, None if tree.prompt_id in grow_on else step),
            name=f"step {step}",
            costs=expected,
            step=step,
            policy_version=step,
            timers=self.timers,
            engines=[self._engine_that_has(job) for job in jobs],
            rule=rule if kept is None else kept.rule,
            kept=kept,
            no_signal=None if rule is None else lambda row: not row["trains"],
        )
        self._engine_of |= {jobs[index].prompt.id: engine for index, engine in sampled.engines.items()}
        self.carried += sampled.paused.values()
        graded = [Graded(row[TREE], Teaches(row["trains"], row["differs"])) for row in sampled.rows.values()]
        # Learnt from all trees on every rank: with other costs, ranks would deal other lists.
        self.generator.costs.update([jobs[index].prompt for index in sampled.rows], [each.tree for each in graded])
        counts = dict(sampled.counts)
        counts["prompts_begun"] = len(sampled.rows) + len(sampled.paused)
        counts["lost"] = float(sum(row["lost"] for row in sampled.rows.values()))
        for row in sampled.rows.values():
            for name, (total, count) in row["numbers"].items():
                counts[SUM + name] = counts.get(SUM + name, 0.0) + total
                counts[COUNT + name] = counts.get(COUNT + name, 0.0) + count
        counts["idle_share_max"] = sampled.idle_share_max
        return graded, counts

    def _engine_that_has(self, job: Job) -> int | None:
        """The engine that alone has what the job goes on with; None: any can sample it."""
        if grows_in_place(job):
            return self._engine_of[job.prompt.id]
        return None if job.home is None else job.home // self.cfg.rollout.engine.tensor_parallel_size

    def waiting(self) -> dict[str, list[dict[str, Any]]]:
        """The trees that wait for another step, JSON-safe, whole on rank 0 and on no other. Collective over all ranks.

        Raises RankLost after distributed.timeout_s.
        """
        return waiting_at_main(self.carried, self.surplus, timeout_s=self.cfg.distributed.timeout_s)

    def restore(self, waiting: Mapping[str, Any]) -> None:
        """The inverse of `waiting`, on every rank: any engine may then go on with any tree."""
        self.carried = [job_of(stored) for stored in waiting.get("carried", [])]
        self.surplus = [Tree.from_dict(stored) for stored in waiting.get("surplus", [])]

    def _make_row(self, tree: Tree, results: Sequence[RewardResult], step: int | None) -> dict[str, Any]:
        """`reward_leaves`, and what the tree is good for, which is known when `step` is None."""
        row = reward_leaves(tree, results, self.cfg)
        # Decided by one process, where the tree was graded: it is replaced there, and a plug-in is asked once.
        teaches = Teaches(True, True) if step is None else judge(tree, self.cfg, step=step)
        return row | {"trains": teaches.trains, "differs": teaches.differs}


def add_counts(totals: dict[str, float], counts: dict[str, float]) -> None:
    """Add what a round cost to the step's totals; of idle_share_max the largest."""
    for name, value in counts.items():
        both = max if name == "idle_share_max" else operator.add
        totals[name] = both(totals.get(name, 0.0), value)


def saved_by_settling(settled: Sequence[Tree], width: int) -> dict[str, float]:
    """Counts of trees that stayed at a handful of leaves; `tokens_saved`: what those up to `width` might have cost.

    Such leaves are taken to cost what the handful cost a leaf.
    """
    saved = sum(tree.unique_tokens() * (width / len(tree.leaves) - 1) for tree in settled if tree.leaves)
    return {"settled": len(settled), "tokens_saved": saved}


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


def _diversity(counts: dict[str, float], trees: list[Tree]) -> dict[str, float]:
    """How different the leaves of a tree are: from sums over trees (`report.complete`), and from their structure."""
    independent = [independent_samples(tree) for tree in trees]
    by_quarter = [sum(of_quarter) / len(trees) for of_quarter in zip(*independent, strict=True)]
    return {f"tree/independent_q{quarter}": samples for quarter, samples in enumerate(by_quarter, 1)} | {
        "tree/distinct_share": counts.get("distinct", 0) / max(1, counts["leaves"]),
        "tree/effective_samples": counts.get("effective", 0) / max(1, counts["prompts"]),
        "tree/divergence_depth": counts.get("common_tokens", 0) / max(1, counts.get("common_pairs", 0)),
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
    cut = sum(counts[f"stop/{reason}"] for reason in CUT)
    stale = sum(len(node.tokens) for tree in kept for node in tree.nodes[1:] if node.policy_version < step)
    reward, accuracy, length = policy_means(
        seen,
        lambda tree, index: tree.rewards[index],
        lambda tree, index: float(tree.verdicts[index] > CORRECT),
        lambda tree, index: tree.response_length(tree.leaves[index]),
    )
    out = {
        "rollout/reward_mean": sum(rewards) / max(1, len(rewards)),
        "rollout/accuracy": sum(verdict > CORRECT for verdict in verdicts) / max(1, len(verdicts)),
        "rollout/reward_policy": reward,
        "rollout/accuracy_policy": accuracy,
        "rollout/response_len_policy": length,
        "rollout/response_len_mean": sum(lengths) / len(lengths),
        "rollout/response_len_max": max(lengths),
        "rollout/truncated_share": cut / leaves,
        "rollout/leaves_masked": cut if masks else 0.0,
        "rollout/prompts_trained": len(kept),
        "rollout/prompts_surplus": totals["surplus"],
        "rollout/prompts_dropped_zero_std": len(seen) - (len(kept) - totals["older"]) - totals["surplus"],
        "rollout/signal_share": (len(kept) - totals["older"] + totals["surplus"]) / max(1, len(seen)),
        "rollout/refills": totals["refills"],
        "rollout/wasted_tokens": totals["wasted"],
        "rollout/surplus_trained": totals["older"],
        "rollout/prompts_settled": totals["settled"],
        "rollout/tokens_saved": totals["tokens_saved"],
        "rollout/engine_steps": totals["engine_steps"],
        "rollout/running_mean": totals["running"] / max(1.0, totals["engine_steps"]),
        "rollout/engine_idle_share": totals["idle_s"] / max(1e-9, totals["engine_s"]),
        "rollout/engine_idle_share_max": totals["idle_share_max"],
        "rollout/engine_grader_wait_share": totals["grader_wait_s"] / max(1e-9, totals["engine_s"]),
        "rollout/prompts_stolen": totals["stolen"],
        "rollout/trees_resumed": totals["resumed"],
        "rollout/trees_restored": totals.get("trees_restored", 0.0),
        "rollout/tokens_restored": totals.get("tokens_restored", 0.0),
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
        **_diversity(counts, seen),
        "tree/budget_divergence": counts.get("budget_divergence", 0.0) / max(1.0, counts.get("budget_decisions", 0.0)),
        "tree/budget_temperature": cfg.rollout.budget_temperature_at(step / max(1, cfg.train.num_rollouts - 1)),
        "reward/lost": totals["lost"],
        "reward/overlapped_share": totals["gradings_early"] / max(1.0, totals["gradings"]),
        "reward/mean": sum(trained) / max(1, len(trained)),
    }
    for name in (key.removeprefix(SUM) for key in totals if key.startswith(SUM)):
        out[f"reward/{name}"] = totals[SUM + name] / totals[COUNT + name]
    out |= {f"reward/{name}": totals[name] for name in REMOTE_COSTS if name in totals} | idle_shares(totals)
    out |= cost_metrics(totals)
    for name in SAMPLING_COUNTS:
        out[f"rollout/{name}"] = counts.get(name, 0.0)
    for name in ("token_ratio", "unique_tokens", "flat_tokens", "fallbacks", "forks", "duplicates", *LOOK_ALIKES):
        out[f"tree/{name}"] = counts.get(name, 0.0)
    out["tree/fork_uncertainty_mean"] = counts.get("fork_uncertainty", 0.0) / max(1.0, counts.get("forks", 0.0))
    for reason in STOP_REASONS:
        out[f"tree/stop_{reason}"] = counts[f"stop/{reason}"]
    out |= turn_metrics(seen, counts, totals)
    return {name: float(value) for name, value in out.items()}
