"""Seconds of the training phases of a step, from FLOPs, bytes and the rates of `hardware.py`. Pure.

Products at a share of peak, tensor-parallel traffic, the pipeline's bubble, reductions over replicas. Nothing is
overlapped but what `parallel.overlap_grad_reduce` says. The rollout is in `engine.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import UPDATE, Flops, Work, forward_flops, recomputed_flops
from treepo_mega.monitor.workload import kinds_of
from treepo_mega.plan.hardware import Gpu, Rates
from treepo_mega.plan.layout import ITEMSIZE, Held, Layout
from treepo_mega.plan.work import TreeShape

GB = 1e9


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices, how many on a node, and what they are expected to reach."""

    gpu: Gpu
    ranks_per_node: int
    rates: Rates

    def link(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s of one rank towards the others of a group of `ranks`, whose neighbours are `stride` ranks apart."""
        near = ranks * stride <= self.ranks_per_node
        return (self.gpu.node_gb_s if near else self.gpu.network_gb_s) * self.rates.link * GB


def pass_seconds(
    cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster, work: Work, *, phase: str, passes: float
) -> float:
    """A pass over `work` on all ranks, `passes` times the products of a forward pass; bubble and traffic included."""
    forward = forward_flops(spec, work)
    again = recomputed_flops(forward, spec, cfg.parallel) if passes > 1 else 0.0 * forward
    total = Flops(
        passes * forward.layers + again.layers,
        passes * forward.attention + again.attention,
        passes * forward.head,
    )
    computing = product_seconds(cfg, cluster, total, phase) / layout.world
    traffic = _traffic_seconds(cfg, spec, layout, cluster, work, passes + (again.layers > 0))
    return (computing + traffic) * (1 + bubble(cfg, layout, work))


def product_seconds(cfg: Config, cluster: Cluster, flops: Flops, phase: str) -> float:
    """Seconds that one device takes for `flops`."""
    kinds = kinds_of(phase, cfg)
    gpu, rates = cluster.gpu, cluster.rates
    return (
        flops.layers / (gpu.flops(kinds.layers) * rates.train)
        + flops.attention / (gpu.flops(kinds.attention) * (rates.train if gpu.is_cpu else rates.attention))
        + flops.head / (gpu.flops(kinds.head) * (rates.train if gpu.is_cpu else rates.head))
    )


def micro_batches(cfg: Config, layout: Layout, work: Work) -> int:
    """Packs of one data-parallel rank in an optimizer step, at least; `work` is of the rollout."""
    of_step = work.tokens / cfg.train.num_steps_per_rollout / layout.dp
    count = max(1, math.ceil(of_step / cfg.train.max_tokens_per_gpu))
    return math.ceil(count / layout.pp) * layout.pp if layout.vpp > 1 else count


def bubble(cfg: Config, layout: Layout, work: Work) -> float:
    """Idle time of a stage / time in which it computes."""
    return (layout.pp - 1) / (layout.vpp * micro_batches(cfg, layout, work))


def _traffic_seconds(
    cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster, work: Work, passes: float
) -> float:
    """Of what ranks exchange in a pass: activations over TP, gathered and scattered around attention and an MLP; keys
    over CP; tokens on their way to experts and back, as if all experts were taken equally often."""
    tokens = work.tokens / layout.dp / layout.cp
    itemsize = ITEMSIZE[cfg.model.params_dtype]
    seconds = 0.0
    if layout.tp > 1:
        # Experts alone leave a rank's tokens as sequence parallelism has split them.
        around = 2 if spec.num_experts and not spec.shared_expert_intermediate_size else 4
        of_layer = around * tokens * spec.hidden_size * itemsize * (layout.tp - 1) / layout.tp
        seconds += of_layer / cluster.link(layout.tp)
    if layout.cp > 1:
        # Keys and values of the other ranks, which attention gathers.
        of_layer = 2 * tokens * (layout.cp - 1) * spec.num_key_value_heads * spec.head_dim * itemsize / layout.tp
        seconds += of_layer / cluster.link(layout.cp, layout.tp)
    if spec.num_experts:
        own = tokens / (layout.tp if cfg.parallel.sequence_parallel else 1)
        seconds += _dispatch_seconds(cfg, spec, layout, cluster, own * spec.hidden_size * itemsize)
    # A backward pass has about the traffic of a forward pass, where it has twice the products.
    times = 1 if passes <= 1 else passes - 1
    return times * seconds * spec.num_layers / layout.pp


def _dispatch_seconds(cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster, own: float) -> float:
    """Of a layer's tokens, `own` bytes of a rank, on their way to experts and back."""
    sharing = layout.ep * layout.expert_tp
    if cfg.model.moe_token_dispatcher_type == "allgather":
        return 2 * own * (sharing - 1) / cluster.link(sharing) if sharing > 1 else 0.0
    # Each token goes to its experts and comes back; those of the rank's own experts stay.
    routed = 2 * own * spec.experts_per_token
    seconds = 0.0
    if layout.ep > 1:
        seconds += routed * (layout.ep - 1) / layout.ep / cluster.link(layout.ep, layout.expert_tp)
    if layout.expert_tp > 1:
        seconds += routed * (layout.expert_tp - 1) / cluster.link(layout.expert_tp)
    return seconds


def step_end_seconds(cfg: Config, layout: Layout, cluster: Cluster, held: Held) -> float:
    """Of one optimizer step beside its passes: gradients reduced, the optimizer, parameters gathered."""
    replicas = layout.dp * layout.cp
    share = (replicas - 1) / replicas
    link = cluster.link(replicas, layout.tp)
    reduce = held.gradients * share / link
    gather = held.parameters * share / link
    # Overlapped with the backward pass, but for the last bucket's part of it.
    if cfg.parallel.overlap_grad_reduce:
        reduce *= 0.1
    # Reads gradients, and reads and writes what the optimizer holds.
    optimizer = (held.gradients / replicas + 2 * held.optimizer) / (
        cluster.gpu.hbm_gb_s * GB * cluster.rates.decode_hbm
    )
    return reduce + gather + optimizer


def training_work(cfg: Config, shape: TreeShape) -> Work:
    """Of one pass over a rollout."""
    return shape.training(cfg, cfg.rollout.rollout_batch_size)


def old_share(cfg: Config) -> float:
    """Part of a rollout that goes through the model for old logprobs, as `actor/passes.py` decides."""
    algo = cfg.algo
    if algo.old_logprobs == "rollout":
        return 0.0
    joined = (
        algo.old_logprobs == "auto"
        and cfg.train.ppo_epochs == 1
        and cfg.loss.logprob_precision == cfg.loss.precision
        and not (algo.weighs_leaves or algo.rejects_leaves or cfg.reward.kl_coef)
    )
    steps = cfg.train.num_steps_per_rollout
    return (steps - 1) / steps if joined else 1.0


def update_seconds(
    cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster, work: Work, held: Held
) -> tuple[float, float]:
    """(passes, optimizer steps) of one rollout's updates."""
    epochs = cfg.train.ppo_epochs
    passes = epochs * pass_seconds(cfg, spec, layout, cluster, work, phase="update", passes=UPDATE)
    steps = epochs * cfg.train.num_steps_per_rollout * step_end_seconds(cfg, layout, cluster, held)
    return passes, steps
