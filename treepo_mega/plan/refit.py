"""What a refit costs on a cluster: bytes per rank and link, buffers, and seconds at stated link speeds. Pure.

    section = plan_refit(cfg, spec, world_size=128, ranks_per_node=8, speeds=LinkSpeeds())
    print("\\n".join(section.lines()))

The bytes are those of the plan that the trainer carries out (`reshard/plan.py`), counted, not estimated. Seconds are
the busiest rank's bytes over the stated speed of the link, in the direction that has more: what perfect links would
need, without latencies and without the engine's own packing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from treepo_mega.config import Config, ConfigError
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.plan.timing import Cluster
from treepo_mega.reshard.plan import LINKS, Traffic, plan_reshard
from treepo_mega.reshard.plan import Cluster as Nodes
from treepo_mega.reshard.sides import engine_side, grid_of, mcore_side

ITEMSIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class LinkSpeeds:
    """GB/s of one rank in one direction. Defaults: an H100 node with NVLink 4 and one 400 Gb/s adapter a GPU, each at
    its nominal speed; `local` is a copy within HBM, which reads and writes."""

    local: float = 1600.0
    node: float = 450.0
    network: float = 50.0

    def of(self, link: str) -> float:
        """Speed of a link by name."""
        return float(getattr(self, link))


def link_speeds(cluster: Cluster) -> LinkSpeeds:
    """What the links of a cluster reach. A copy within a device reads and writes its memory."""
    gpu = cluster.gpu
    reached = cluster.rates.link
    return LinkSpeeds(gpu.hbm_gb_s / 2 * reached, gpu.node_gb_s * reached, gpu.network_gb_s * reached)


@dataclass(frozen=True, slots=True)
class RefitPlan:
    """A refit in numbers. `model_bytes`: all weights once, in the dtype on the way; `shards`: Megatron's TP x PP."""

    title: str
    world_size: int
    ranks_per_node: int
    shards: int
    model_bytes: int
    traffic: Traffic
    speeds: LinkSpeeds

    def seconds(self, link: str) -> float:
        """The busiest rank's time on a link."""
        traffic = self.traffic
        # A link carries both directions at once, so the fuller one decides. GB are decimal, as in a link's data sheet.
        return max(traffic.sent_max[link], traffic.received_max[link]) / 1e9 / self.speeds.of(link)

    def lines(self) -> list[str]:
        """For people."""
        traffic = self.traffic
        out = [
            f"refit: {self.title}",
            f"  {self.world_size} ranks, {self.ranks_per_node} a node; the model is {self.model_bytes / 1e9:.1f} GB, a "
            f"rank's part of its engine {traffic.wanted_max / 1e9:.2f} GB",
            f"  {'link':<9}{'all ranks GB':>14}{'sends GB':>11}{'receives GB':>13}{'at GB/s':>9}{'seconds':>10}"
            "   (of the busiest rank)",
        ]
        for link in LINKS:
            out.append(
                f"  {link:<9}{traffic.by_link[link] / 1e9:>14.2f}{traffic.sent_max[link] / 1e9:>11.2f}"
                f"{traffic.received_max[link] / 1e9:>13.2f}{self.speeds.of(link):>9.0f}{self.seconds(link):>10.4f}"
            )
        ratio = f"{traffic.moved / traffic.bound:.2f}" if traffic.bound else "nothing to move"
        every = [self.seconds(link) for link in LINKS]
        out += [
            f"  moved between ranks / lower bound: {ratio}; between nodes / lower bound: "
            + (
                f"{traffic.by_link['network'] / traffic.bound_network:.2f}"
                if traffic.bound_network
                else "nothing to move"
            ),
            f"  {traffic.rounds} rounds; buffers of a rank at most 2 x {traffic.buffer_max / 2**20:.1f} MiB",
            f"  {max(every):.3f} s with all links busy at once, {sum(every):.3f} s one after another; collecting "
            f"everything everywhere would bring {self.gathered / 1e9:.1f} GB to a rank instead of "
            f"{self.received / 1e9:.1f}",
        ]
        return out

    @property
    def received(self) -> int:
        """Most bytes that a rank receives from others: at most this."""
        # The two maxima may be of different ranks, so that their sum is a bound and no rank's own figure.
        return self.traffic.received_max["node"] + self.traffic.received_max["network"]

    @property
    def gathered(self) -> int:
        """Bytes that a rank would receive if it collected every tensor: the model but for an even share of it."""
        return self.model_bytes - self.model_bytes // self.shards

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        seconds = {link: self.seconds(link) for link in LINKS}
        return asdict(self) | {"seconds": seconds, "moved_over_bound": self.traffic.moved / max(1, self.traffic.bound)}


def smallest_world(cfg: Config) -> int:
    """The fewest ranks on which both Megatron's layout and a whole engine fit."""
    return math.lcm(cfg.parallel.model_parallel_size, cfg.rollout.engine.tensor_parallel_size)


def plan_refit(
    cfg: Config, spec: ModelSpec, *, world_size: int, ranks_per_node: int, speeds: LinkSpeeds | None = None
) -> RefitPlan:
    """Plan the refit of `cfg` on `world_size` ranks. Raises ConfigError for a cluster that is not whole nodes, and
    LayoutError for a model that does not divide."""
    if world_size > ranks_per_node and world_size % ranks_per_node:
        raise ConfigError(f"world size {world_size} is not a multiple of {ranks_per_node} ranks a node")
    parallel = cfg.parallel
    tp_v = cfg.rollout.engine.tensor_parallel_size
    # The narrower dtype travels, by the rule of `Resharder.between`: the sender casts down or the receiver casts up.
    dtype = min(cfg.model.params_dtype, cfg.rollout.engine.dtype or cfg.model.params_dtype, key=ITEMSIZE.__getitem__)
    plan = plan_reshard(
        mcore_side(spec, grid_of(cfg), world_size),
        engine_side(cfg, spec, world_size),
        Nodes(world_size, ranks_per_node),
        itemsize=ITEMSIZE[dtype],
        bucket_bytes=cfg.reshard.bucket_mb << 20,
    )
    elements = sum(math.prod(shape) for shape in hf_shapes(spec).values())
    shards = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    whole = " with whole experts" if cfg.rollout.engine.enable_expert_parallel else ""
    title = (
        f"Megatron TP {tp} x PP {pp} x DP {world_size // shards} -> {world_size // tp_v} engines x TP_v {tp_v}{whole}, "
        f"{dtype}"
    )
    return RefitPlan(
        title, world_size, ranks_per_node, shards, elements * ITEMSIZE[dtype], plan.traffic(), speeds or LinkSpeeds()
    )
