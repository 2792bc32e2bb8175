"""The plan of a whole run: memory by phase, seconds by phase, throughput, GPU-hours and cost. Pure.

plan = plan_run(cfg, spec, world_size=128, cluster=Cluster(gpu_of("H100"), 8, Rates()))
print("\\n".join(plan.lines()))
plan.memory.problems()                  # [] when it fits
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import UPDATE, Work, forward_flops, mfu
from treepo_mega.monitor.workload import kinds_of
from treepo_mega.plan.disk import DiskPlan, plan_disk
from treepo_mega.plan.hardware import GIB, Rates
from treepo_mega.plan.layout import Layout
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.memory import Memory, plan_memory
from treepo_mega.plan.refit import RefitPlan, link_speeds, plan_refit
from treepo_mega.plan.seconds import PHASES, phase_seconds, tree_shape
from treepo_mega.plan.timing import Cluster, bubble, micro_batches, training_work

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """See the module docstring. `price`: of an hour of a device, in any currency; None: not asked."""

    layout: Layout
    cluster: Cluster
    lengths: Lengths
    memory: Memory
    seconds: dict[str, float]
    refit: RefitPlan | None
    work: Work
    """Of a training pass over a rollout."""
    steps: int
    micro_batches: int
    bubble: float
    update_mfu: float | None
    disk: DiskPlan
    price: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def step_s(self) -> float:
        """Seconds of a step, evaluation left out."""
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.step_s * self.steps * self.layout.world / HOUR

    def lines(self) -> list[str]:
        """For people."""
        return [
            *self._head(),
            *self._memory(),
            *self.disk.lines(),
            *self._time(),
            *self._run(),
            *(self.refit.lines() if self.refit else []),
        ]

    def summary(self) -> str:
        """One sentence for people."""
        fullest = max(self.memory.phases, key=lambda phase: phase.total)
        limit = "" if self.memory.limit is None else f" of {self.memory.limit / GIB:.1f}"
        return (
            f"plan for {self.layout.world} x {self.cluster.gpu.name}: {fullest.total / GIB:.1f}{limit} GiB in "
            f"{fullest.phase}, {self.step_s:.0f} s a step, {self.gpu_hours:,.0f} device-hours in all (assumed lengths "
            "and rates: treepo-mega plan)"
        )

    def _head(self) -> list[str]:
        gpu = self.cluster.gpu
        where = f"{self.layout.world} x {gpu.name}, {self.cluster.ranks_per_node} a node"
        lengths = self.lengths
        return [
            f"plan: {self.layout.title} on {where}",
            f"  lengths ({lengths.source}): response {lengths.response:.0f} tokens in the mean, prompt "
            f"{lengths.prompt:.0f}; {lengths.kept:.0%} of prompts kept",
            *(f"  note: {note}" for note in self.notes),
        ]

    def _memory(self) -> list[str]:
        memory = self.memory
        limit = "" if memory.limit is None else f" of {memory.limit / GIB:.1f}"
        out = [f"memory, GiB of the fullest rank{limit}"]
        for phase in memory.phases:
            over = "  DOES NOT FIT" if memory.limit is not None and phase.total > memory.limit else ""
            out.append(f"  {phase.phase:<13} rank {phase.rank:<6}{phase.total / GIB:>7.1f}   {phase.largest(6)}{over}")
        tokens = memory.kv_tokens
        longest = self.lengths.prompt + self.lengths.response
        out.append(
            f"  KV cache of an engine: {tokens:,.0f} tokens, {tokens / longest:,.0f} paths of {longest:.0f} tokens"
        )
        if memory.host:
            out.append(f"  host memory of a node: {memory.host / GIB:.0f} GiB pinned for what leaves the devices")
        return out

    def _time(self) -> list[str]:
        out = [f"time, seconds of a step{'':<12}share"]
        for phase in PHASES:
            seconds = self.seconds[phase]
            if seconds > 0.0005:
                out.append(f"  {phase:<13}{seconds:>14.2f}{seconds / self.step_s:>14.0%}")
        out.append(f"  {'step':<13}{self.step_s:>14.2f}")
        out.append(
            f"  {self.micro_batches} micro-batches a rank and optimizer step; pipeline bubble {self.bubble:.0%}"
            + ("" if self.update_mfu is None else f"; update at {self.update_mfu:.0%} MFU")
        )
        return out

    def _run(self) -> list[str]:
        per = self.step_s * self.layout.world
        cost = "" if self.price is None else f", {self.gpu_hours * self.price:,.0f} at {self.price:g} an hour"
        return [
            f"run: {self.work.unique / per:,.0f} tokens/s per device unique, {self.work.flat / per:,.0f} flat; "
            f"{self.steps} steps in {self.step_s * self.steps / HOUR:,.1f} h, {self.gpu_hours:,.0f} device-hours{cost}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "layout": asdict(self.layout),
            "gpu": self.cluster.gpu.name,
            "ranks_per_node": self.cluster.ranks_per_node,
            "rates": asdict(self.cluster.rates),
            "rate_sources": Rates.sources(),
            "lengths": asdict(self.lengths),
            "memory": self.memory.to_dict(),
            "disk": asdict(self.disk),
            "seconds": self.seconds | {"step": self.step_s},
            "micro_batches": self.micro_batches,
            "bubble": self.bubble,
            "update_mfu": self.update_mfu,
            "tokens_per_s_per_gpu": {
                "unique": self.work.unique / self.step_s / self.layout.world,
                "flat": self.work.flat / self.step_s / self.layout.world,
            },
            "gpu_hours": self.gpu_hours,
            "cost": None if self.price is None else self.gpu_hours * self.price,
            "notes": list(self.notes),
            "refit": None if self.refit is None else self.refit.to_dict(),
        }


def plan_run(
    cfg: Config,
    spec: ModelSpec,
    *,
    world_size: int,
    cluster: Cluster,
    lengths: Lengths | None = None,
    price: float | None = None,
    refit: bool = True,
) -> RunPlan:
    """Plan `cfg` on `world_size` ranks. `refit` False leaves its plan out, for a search over many layouts.

    Raises ConfigError for a cluster or lengths that do not go together, LayoutError for a model that does not divide.
    """
    layout = Layout.of(cfg, world_size)
    lengths = lengths or Lengths.assumed(cfg, cluster.rates)
    memory = plan_memory(cfg, spec, layout, cluster)
    speeds = link_speeds(cluster)
    found = None
    # The busiest rank receives its part of the engine's weights, which is what the plan counts exactly.
    refit_s = memory.engine_weights / (speeds.network if world_size > cluster.ranks_per_node else speeds.node) / 1e9
    if refit:
        found = plan_refit(cfg, spec, world_size=world_size, ranks_per_node=cluster.ranks_per_node, speeds=speeds)
        refit_s = sum(found.seconds(each) for each in ("local", "node", "network"))
    seconds = phase_seconds(
        cfg, spec, layout, cluster, lengths, held=memory.held, kv_budget=max(1.0, memory.kv_budget), refit_s=refit_s
    )
    shape = tree_shape(cfg, lengths)
    work = lengths.trained * training_work(cfg, shape)
    share = mfu(
        UPDATE * cfg.train.ppo_epochs * forward_flops(spec, work),
        seconds=seconds["update"],
        gpus=world_size,
        device=cluster.gpu.device,
        kinds=kinds_of("update", cfg),
    )
    notes = []
    if cfg.model.transformer_impl != "local":
        notes.append("activations are those of Megatron's local layers; Transformer Engine's keep about as much")
    if spec.num_experts:
        notes.append("experts are taken to be asked for equally often: a rank whose experts are in demand needs more")
    return RunPlan(
        layout, cluster, lengths, memory, seconds, found, work, cfg.train.num_rollouts,
        micro_batches(cfg, layout, work), bubble(cfg, layout, work), share,
        plan_disk(cfg, spec, shape, lengths.kept), price, tuple(notes),
    )  # fmt: skip
