"""What lies in a rank's memory in each phase, and whether it fits. Pure.

    memory = plan_memory(cfg, spec, layout, cluster)
    memory.problems()                 # [] or sentences: phase, rank, largest items

Phases are the states of the hand-over (`sync/handover.py`) that differ in what is there: while the engine is built and
during a refit gradients and optimizer state are on the host, and during a rollout too; in a training phase the engine
sleeps. The rank of a phase is the fullest, one of each pipeline stage being looked at. Bytes throughout.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.modelspec.vllm_layout import vllm_layout
from treepo_mega.plan.activations import activation_peak
from treepo_mega.plan.engine import kv_bytes
from treepo_mega.plan.hardware import GIB
from treepo_mega.plan.layout import ITEMSIZE, Held, Layout, held_bytes
from treepo_mega.plan.timing import Cluster

BUFFERS = 4
"""Of reshard.bucket_mb in a refit: two rounds in flight, sent and received."""


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """The fullest rank of a phase. `items`: (what, bytes), in the order of the phase's story."""

    phase: str
    rank: int
    items: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        """Bytes of all items."""
        return sum(size for _, size in self.items)

    def largest(self, count: int = 3) -> str:
        """For people."""
        ranked = sorted(self.items, key=lambda item: -item[1])[:count]
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in ranked)


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all phases. `limit`: bytes of a device, None for a CPU."""

    limit: float | None
    phases: tuple[PhaseMemory, ...]
    held: Held
    """Of the rank with the most."""
    engine_weights: float
    kv_budget: float
    """Bytes of a rank's part of the KV cache."""
    kv_tokens: float
    """Tokens that an engine's cache holds."""
    host: float
    """Bytes of host memory a node that hold what left the devices."""

    @property
    def peak(self) -> float:
        """Bytes of the fullest phase."""
        return max(phase.total for phase in self.phases)

    def problems(self) -> list[str]:
        """A sentence for each phase that does not fit."""
        out = []
        if self.kv_budget <= 0:
            out.append(
                f"phase rollout: an engine's weights of {self.engine_weights / GIB:.1f} GiB a rank leave no room for a "
                "KV cache in its share of the memory (rollout.engine.gpu_memory_utilization)"
            )
        for phase in self.phases:
            if self.limit is not None and phase.total > self.limit:
                out.append(
                    f"phase {phase.phase}, rank {phase.rank}: {phase.total / GIB:.1f} GiB of {self.limit / GIB:.1f}; "
                    f"the largest: {phase.largest()}"
                )
        return out

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"problems": self.problems()}


def plan_memory(cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster) -> Memory:
    """Of every phase. Raises LayoutError for a model that does not divide."""
    rates = cluster.rates
    gpu = cluster.gpu
    stages = range(layout.pp) if layout.pp <= 2 else (0, 1, layout.pp - 1)
    held = {stage: _fullest(cfg, spec, layout, stage) for stage in stages}
    tp_v = layout.tp_v
    weights = engine_weights(cfg, spec, tp_v)
    context = rates.runtime_gib * GIB if gpu.is_cpu else rates.context_gib * GIB
    reference = {stage: float(held[stage].parameters if cfg.needs_reference else 0) for stage in stages}
    if gpu.memory_gib is None:
        limit = None
        kv = float(cfg.rollout.engine.kv_cache_memory_mb << 20)
        engine = [("engine weights", weights), ("KV cache", kv)]
    else:
        limit = gpu.memory_gib * GIB
        share = cfg.rollout.engine.gpu_memory_utilization * limit
        kv = share - weights - rates.engine_gib * GIB
        engine = [("engine weights", weights), ("KV cache", max(0.0, kv)), ("engine workspace", rates.engine_gib * GIB)]

    def phase(name: str, rest: dict[int, list[tuple[str, float]]]) -> PhaseMemory:
        found = []
        for stage in stages:
            items = [
                ("CUDA, NCCL" if not gpu.is_cpu else "runtime", context),
                ("parameters", float(held[stage].parameters)),
            ]
            items += [("reference", reference[stage]), *rest[stage]]
            found.append(PhaseMemory(name, layout.first_rank(stage), tuple(item for item in items if item[1])))
        return max(found, key=lambda each: each.total)

    training = {}
    peaks = {stage: activation_peak(cfg, spec, layout, stage) for stage in stages}
    away = [("gradients", "gradients"), ("optimizer state", "optimizer")]
    state = {stage: [(name, float(getattr(held[stage], part))) for name, part in away] for stage in stages}
    # On a CPU the hand-over only keeps the books: all is there all the time.
    with_engine = {stage: (state[stage] if gpu.is_cpu else []) + engine for stage in stages}
    asleep = engine if gpu.is_cpu else []
    for name in ("old_logprobs", "update"):
        training[name] = {
            stage: [*state[stage], *asleep, ("activations", rates.allocator * getattr(peaks[stage], name))]
            for stage in stages
        }
    # A model that is smaller than a bucket goes in one.
    bucket = [("refit buffers", BUFFERS * min(weights, float(cfg.reshard.bucket_mb << 20)))]
    refit = {stage: (state[stage] if gpu.is_cpu else []) + engine[:1] + bucket for stage in stages}
    phases = [
        phase("reshard", refit),
        phase("rollout", with_engine),
        phase("old_logprobs", training["old_logprobs"]),
        phase("update", training["update"]),
    ]
    most = max(held.values(), key=lambda each: each.total)
    per_token = kv_bytes(cfg, spec)
    return Memory(
        limit, tuple(phases), most, weights, kv, max(0.0, kv) / per_token,
        0.0 if gpu.is_cpu else most.optimizer * min(cluster.ranks_per_node, layout.world),
    )  # fmt: skip


def _fullest(cfg: Config, spec: ModelSpec, layout: Layout, stage: int) -> Held:
    """Of the stage's rank with the most optimizer state: shards are even but for padding."""
    place = layout.place(layout.first_rank(stage))
    return held_bytes(cfg, spec, layout, place)


def engine_weights(cfg: Config, spec: ModelSpec, tp_v: int) -> float:
    """Bytes of a rank's part of the engine's weights: matrices of layers in FP8 where the engine is quantised."""
    engine = cfg.rollout.engine
    wide = ITEMSIZE[str(engine.dtype)]
    matrices, others = _engine_elements(spec, tp_v, engine.enable_expert_parallel)
    return float(matrices * (1 if engine.quantization else wide) + others * wide)


@functools.lru_cache(maxsize=256)
def _engine_elements(spec: ModelSpec, tp_v: int, expert_parallel: bool) -> tuple[int, int]:
    """(in matrices of layers, elsewhere) of a rank's part of the engine."""
    counts = [0, 0]
    for name, param in vllm_layout(spec, tp=tp_v, tp_rank=0, expert_parallel=expert_parallel).items():
        counts[not (".layers." in name and len(param.shape) > 1)] += math.prod(param.shape)
    return counts[0], counts[1]
