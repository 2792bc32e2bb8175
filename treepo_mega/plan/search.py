"""Layouts that fit a model and a cluster, the fastest first. Pure.

    found = search(cfg, spec, world_size=128, cluster=cluster)
    found[0].overrides            # ("parallel.tensor_model_parallel_size=8", ...): what makes the config fit
    found[0].plan.step_s

Tried are TP, PP, VPP, CP, EP, recomputation, the engine's TP and its share of the memory, which is the largest that
leaves room for what stays beside it. Everything else is the configuration's own. A layout counts only if all the rules
of a start hold for it, and every phase fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from treepo_mega.config import Config, ConfigError, check
from treepo_mega.modelspec.mcore_layout import LayoutError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.layout import Layout
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.memory import plan_memory
from treepo_mega.plan.run import RunPlan, plan_run
from treepo_mega.plan.timing import Cluster

TP = (1, 2, 4, 8, 16)
VPP = (None, 2, 4)
EP = (1, 2, 4, 8, 16)
CP = (1, 2)
FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}
NONE: dict[str, Any] = {"granularity": None, "method": None, "num_layers": None}
HIGHEST_SHARE = 0.9
"""Of a GPU's memory for the engine."""
SPARE_SHARE = 0.02
"""Of a GPU's memory that a proposal leaves free in every phase."""


@dataclass(frozen=True, slots=True)
class Found:
    """A layout that fits. `overrides`: the keys in which it differs from the configuration, ready to be given."""

    plan: RunPlan
    cfg: Config
    overrides: tuple[str, ...]

    def line(self) -> str:
        """For people."""
        fullest = max(phase.total for phase in self.plan.memory.phases) / 2**30
        return f"{self.plan.step_s:8.1f} s a step, {fullest:5.1f} GiB: " + (" ".join(self.overrides) or "as it is")


def search(
    cfg: Config, spec: ModelSpec, *, world_size: int, cluster: Cluster, lengths: Lengths | None = None, most: int = 5
) -> list[Found]:
    """At most `most` layouts on so many ranks, the fastest first; one for each TP x PP x CP, so that they differ."""
    best: dict[tuple[int, int, int], Found] = {}
    for changes in _trainings(cfg, spec, world_size, cluster):
        if not _trains(cfg.replace(changes), spec, world_size, cluster):
            continue
        for tp_v in _divisors(spec.num_attention_heads, min(world_size, 16)):
            found = _try(
                cfg, spec, world_size, cluster, lengths, {**changes, "rollout.engine.tensor_parallel_size": tp_v}
            )
            if found is None:
                continue
            layout = found.plan.layout
            key = (layout.tp, layout.pp, layout.cp)
            faster = key not in best or found.plan.step_s < best[key].plan.step_s
            # After the plan: the rules cost more, and most layouts are not the fastest of theirs.
            if faster and _may_start(found.cfg, spec, world_size):
                best[key] = found
    return sorted(best.values(), key=lambda each: each.plan.step_s)[:most]


def smallest_that_fits(
    cfg: Config, spec: ModelSpec, *, above: int, cluster: Cluster, lengths: Lengths | None = None
) -> tuple[int, list[Found]]:
    """The next world size above `above` on which something fits, by doubling it; (0, []) when none up to 64 times."""
    for factor in (2, 4, 8, 16, 32, 64):
        if found := search(cfg, spec, world_size=above * factor, cluster=cluster, lengths=lengths, most=3):
            return above * factor, found
    return 0, []


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in TP if size <= most and number % size == 0]


def _trainings(cfg: Config, spec: ModelSpec, world_size: int, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Layouts of the trainer that divide model and cluster."""
    stages = [size for size in range(1, spec.num_layers + 1) if spec.num_layers % size == 0 and size <= 32]
    widths = _divisors(spec.num_key_value_heads, min(world_size, cluster.ranks_per_node))
    widest = EP if spec.num_experts else (1,)
    etp = cfg.parallel.expert_tensor_parallel_size
    for tp, pp, vpp, cp, ep, again in itertools.product(widths, stages, VPP, CP, widest, (NONE, FULL)):
        if world_size % (tp * pp * cp):
            continue
        if ep > 1 and (world_size // pp % ((etp or tp) * ep) or spec.num_experts % ep):
            continue
        if vpp is not None and (pp == 1 or spec.num_layers % (pp * vpp)):
            continue
        yield {
            "parallel.tensor_model_parallel_size": tp,
            "parallel.pipeline_model_parallel_size": pp,
            "parallel.virtual_pipeline_model_parallel_size": vpp,
            "parallel.context_parallel_size": cp,
            "parallel.sequence_parallel": tp > 1,
            "parallel.expert_model_parallel_size": ep,
            **{f"parallel.recompute_{name}": value for name, value in again.items()},
        }


def _trains(cfg: Config, spec: ModelSpec, world_size: int, cluster: Cluster) -> bool:
    """Whether the trainer's own phases fit, whatever engine is beside them."""
    try:
        memory = plan_memory(cfg, spec, Layout.of(cfg, world_size), cluster)
    except (ConfigError, LayoutError):
        return False
    training = [phase for phase in memory.phases if phase.phase in ("old_logprobs", "update")]
    return memory.limit is None or all(phase.total <= memory.limit for phase in training)


def _try(
    cfg: Config,
    spec: ModelSpec,
    world_size: int,
    cluster: Cluster,
    lengths: Lengths | None,
    changes: dict[str, Any],
) -> Found | None:
    """The layout with the largest share for the engine that fits; None when there is none."""
    tried = cfg.replace(changes)
    try:
        # Cheaper than the rules: most layouts end here.
        plan = plan_run(tried, spec, world_size=world_size, cluster=cluster, lengths=lengths, refit=False)
    except (ConfigError, LayoutError):
        return None
    limit = plan.memory.limit
    if limit is not None:
        rollout = next(phase for phase in plan.memory.phases if phase.phase == "rollout")
        engine = cfg.rollout.engine.gpu_memory_utilization * limit
        room = (limit - (rollout.total - max(engine, 0.0))) / limit - SPARE_SHARE
        share = min(HIGHEST_SHARE, int(100 * room) / 100)
        if share <= 0:
            return None
        if plan.memory.problems() or share > tried.rollout.engine.gpu_memory_utilization:
            tried = tried.replace({"rollout.engine.gpu_memory_utilization": share})
            plan = plan_run(tried, spec, world_size=world_size, cluster=cluster, lengths=lengths, refit=False)
    roomy = limit is None or all(phase.total <= (1 - SPARE_SHARE) * limit for phase in plan.memory.phases)
    if plan.memory.problems() or not roomy:
        return None
    return Found(plan, tried, _overrides(cfg, tried, [*changes, "rollout.engine.gpu_memory_utilization"]))


def _may_start(cfg: Config, spec: ModelSpec, world_size: int) -> bool:
    """Whether all the rules of a start hold."""
    try:
        check(cfg, world_size, spec)
    except ConfigError:
        return False
    return True


def _overrides(before: Config, after: Config, keys: list[str]) -> tuple[str, ...]:
    out = []
    for key in keys:
        old = new = None
        for config, is_new in ((before, False), (after, True)):
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            old, new = (old, value) if is_new else (value, new)
        if old != new:
            said = "null" if new is None else str(new).lower() if isinstance(new, bool) else str(new)
            out.append(f"{key}={said}")
    return tuple(out)
