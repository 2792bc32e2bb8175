"""Passes over a step's packs: old and reference logprobs filled in, optimizer steps summed up as metrics.

Everything is collective over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo_mega.actor.losses import ROWS, LossError, PackLoss
from treepo_mega.actor.update import Actor, Policy
from treepo_mega.config import AlgoConfig, Config
from treepo_mega.loss.mismatch import MISMATCH, mismatch_metrics
from treepo_mega.runtime import dist
from treepo_mega.tree.correction import Verdict, gather_evidence, judge
from treepo_mega.tree.pack import StepPlan


def provide_old_logprobs(actor: Actor, plans: Sequence[StepPlan], cfg: Config) -> Sequence[StepPlan]:
    """What `algo.old_logprobs` says into the packs of last-stage ranks; the head's guard watches the passes.

    Returns the plans that went through the model for it. Without one, the guard takes its sample in the first update.
    """
    suffices = first_forward_suffices(cfg)
    from_rollout = cfg.algo.old_logprobs == "rollout"
    for pack in plans[0].packs:
        pack.on_policy = True
        pack.unseen = from_rollout or (suffices and len(plans) == 1)
    if from_rollout:
        for plan in plans:
            for pack in plan.packs:
                pack.old_logprobs = pack.rollout_logprobs
        return []
    computed = plans[1:] if suffices else plans
    fill_old_logprobs(actor, computed, replay=cfg.rollout.notes_routing)
    return computed


def first_forward_suffices(cfg: Config) -> bool:
    """Whether the first mini-batch needs no pass of its own: its update's forward pass gives the same logprobs."""
    algo = cfg.algo
    return (
        algo.old_logprobs == "auto"
        # The update then routes for itself.
        and cfg.rollout.routing_replay != "old"
        # A second epoch meets the first mini-batch again, when the weights have moved.
        and cfg.train.ppo_epochs == 1
        and cfg.loss.logprob_precision == cfg.loss.precision
        # These look at whole trajectories before the first update.
        and not (algo.weighs_leaves or algo.rejects_leaves or cfg.reward.kl_coef)
    )


def fill_old_logprobs(actor: Actor, plans: Sequence[StepPlan], *, replay: bool = False) -> None:
    """The actor's logprobs before the update into the packs of last-stage ranks; the head's guard watches.

    `replay`: tokens go to the experts that the packs name.
    """
    for plan in plans:
        # Not strict: ranks of other stages get None, and take part in the pass all the same.
        known = actor.logprobs(plan.packs, watch=True, replay=replay)
        for pack, logprobs in zip(plan.packs, known or (), strict=False):
            pack.old_logprobs = logprobs


def fill_reference_logprobs(reference: Policy, plans: Sequence[StepPlan]) -> None:
    """The frozen policy's logprobs into the packs of last-stage ranks."""
    for plan in plans:
        for pack, logprobs in zip(plan.packs, reference.logprobs(plan.packs) or (), strict=False):
            pack.ref_logprobs = logprobs


def engine_mismatch(plans: Sequence[StepPlan]) -> dict[str, float]:
    """How far the engine's logprobs of what it sampled with these weights are from the actor's, nats."""
    diffs = []
    for pack in (pack for plan in plans for pack in plan.packs):
        if pack.old_logprobs is not None:
            diff = np.abs(pack.old_logprobs - pack.rollout_logprobs)
            diffs.append(diff if pack.fresh is None else diff[pack.fresh])
    # Only last-stage ranks have old logprobs. The others add zeros, because the sums are collective.
    sums = dist.sum_over_replicas(
        {"diff": float(sum(diff.sum() for diff in diffs)), "rows": float(sum(diff.size for diff in diffs))}
    )
    peak = dist.max_over_ranks({"max": max((float(diff.max()) for diff in diffs if diff.size), default=0.0)})
    return {
        "rollout/logprob_abs_diff_mean": sums["diff"] / max(1.0, sums["rows"]),
        "rollout/logprob_abs_diff_max": peak["max"],
    }


def correct_leaves(plans: Sequence[StepPlan], algo: AlgoConfig) -> tuple[list[StepPlan], dict[str, float]]:
    """Weigh and reject trajectories by the distance of engine and trainer, once old logprobs are filled in.

    Returns the plans that have a trajectory left, their packs' masses renewed; and metrics. Collective over all ranks.
    """
    if not (algo.weighs_leaves or algo.rejects_leaves):
        return list(plans), {}
    left: list[StepPlan] = []
    verdicts: list[Verdict] = []
    for plan in plans:
        if plan.lesson is None:
            raise LossError(
                "the plan has no lesson: trajectories can be weighed only where it is known what they teach"
            )
        segments = plan.lesson.laid_out
        mine = gather_evidence(plan.packs, len(segments), algo)
        # All ranks judge by the same sums, and so leave out the same plans: an optimizer step is collective.
        verdict = judge(plan.lesson, dist.sum_array_over_replicas(mine), algo)
        credit = plan.lesson.row_credit(verdict.factors, verdict.kept)
        for pack in plan.packs:
            pack.relearn(credit)
        verdicts.append(verdict)
        if (credit.count * segments.length)[segments.trained].any():
            left.append(plan)
    # The update's own figures are missing where everything is rejected, and this is why.
    metrics = engine_mismatch(plans)
    if algo.weighs_leaves:
        factors = np.concatenate([verdict.factors for verdict in verdicts if verdict.factors is not None])
        ratios = np.concatenate([verdict.ratios for verdict in verdicts if verdict.ratios is not None])
        metrics |= {
            "rollout/is_weight_mean": float(factors.mean()),
            "rollout/is_ratio_min": float(ratios.min()),
            "rollout/is_ratio_max": float(ratios.max()),
        }
    if algo.rejects_leaves:
        rejected = sum(int((~verdict.kept).sum()) for verdict in verdicts if verdict.kept is not None)
        metrics["rollout/leaves_rejected"] = float(rejected)
    return left, metrics


def optimizer_steps(actor: Actor, plans: Sequence[StepPlan], loss: PackLoss, epochs: int = 1) -> dict[str, float]:
    """`epochs` times one optimizer step a plan, in the order of `plans`.

    Returns the `train/` metrics of all these steps: means, maxima of max_*, and the last step's norm and rate. What the
    packs hold is not touched: every epoch has the ratios to the same old logprobs.
    """
    stats = []
    for _ in range(epochs):
        for plan in plans:
            stats.append(actor.update(plan.packs, loss))
            # The weights have moved: what a later epoch's forward pass gives is no longer from before the update.
            for pack in plan.packs:
                pack.on_policy = False
                pack.unseen = False
    out = {f"train/{name}": sum(step[name] for step in stats) for name in ("skipped_steps", "ranks_split")}
    for name in ("loss", "pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "tis_weight"):
        out[f"train/{name}"] = sum(step[name] for step in stats) / len(stats)
    out["train/ratio_max_diff"] = max(step["max_ratio_diff"] for step in stats)
    apart = {name: sum(step[name] for step in stats) for name in stats[0] if name.startswith(MISMATCH)}
    out["rollout/logprob_abs_diff_mean"] = apart[MISMATCH] / max(1.0, apart[ROWS])
    out["rollout/logprob_abs_diff_max"] = max(step["max_mismatch"] for step in stats)
    out |= mismatch_metrics(apart) | actor.head_metrics() | actor.routing(plans) | actor.costs.metrics()
    return out | {"grad-norm": stats[-1]["grad-norm"], "learning-rate": stats[-1]["learning-rate"]}
