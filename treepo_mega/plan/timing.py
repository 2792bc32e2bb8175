"""Seconds of every phase of a step, from FLOPs, bytes and the rates of `hardware.py`. Pure.

Training phases: products at a share of peak, tensor-parallel traffic, the pipeline's bubble, reductions over replicas.
Rollout: a decode step reads the weights and the batch's keys and values, or multiplies, whichever takes longer, and
launches its kernels; steps are summed over the depths of trees that all start together, so that a long tail of few
paths costs what it does. Nothing is overlapped but what `parallel.overlap_grad_reduce` says.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import hf_shapes
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import UPDATE, Flops, Work, forward_flops, recomputed_flops
from treepo_mega.monitor.workload import kinds_of
from treepo_mega.plan.hardware import Gpu, Rates
from treepo_mega.plan.layout import ITEMSIZE, Held, Layout
from treepo_mega.plan.work import TreeShape, batches

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
    """Of what ranks exchange in a pass: activations over TP, twice gathered and scattered a layer; keys over CP."""
    tokens = work.tokens / layout.dp / layout.cp
    itemsize = ITEMSIZE[cfg.model.params_dtype]
    seconds = 0.0
    if layout.tp > 1:
        of_layer = 4 * tokens * spec.hidden_size * itemsize * (layout.tp - 1) / layout.tp
        seconds += of_layer / cluster.link(layout.tp)
    if layout.cp > 1:
        # Keys and values of the other ranks, which attention gathers.
        of_layer = 2 * tokens * (layout.cp - 1) * spec.num_key_value_heads * spec.head_dim * itemsize / layout.tp
        seconds += of_layer / cluster.link(layout.cp, layout.tp)
    # A backward pass has about the traffic of a forward pass, where it has twice the products.
    times = 1 if passes <= 1 else passes - 1
    return times * seconds * spec.num_layers / layout.pp


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


@dataclass(frozen=True, slots=True)
class Engine:
    """What a decode step depends on. Bytes are of one rank of the engine."""

    weight_bytes: float
    kv_bytes: float
    """Of one token."""
    most_running: float
    matrices: float
    """FLOPs of one token in all matrices, of the whole engine."""
    attention: float
    """FLOPs of one (query, key) pair, of the whole engine."""

    @classmethod
    def of(cls, cfg: Config, spec: ModelSpec, kv_budget: float, mean_context: float) -> Engine:
        """`kv_budget`: bytes of a rank's cache, in which sequences of `mean_context` tokens must fit."""
        engine = cfg.rollout.engine
        tp_v = engine.tensor_parallel_size
        itemsize = 1 if engine.quantization else ITEMSIZE[str(engine.dtype)]
        kv = kv_bytes(cfg, spec)
        flops = forward_flops(spec, Work(1, 1, 1))
        fits = max(1.0, kv_budget / kv / max(1.0, mean_context))
        return cls(
            elements(spec) * itemsize / tp_v,
            kv,
            min(float(engine.max_num_seqs), fits),
            flops.layers + flops.head,
            flops.attention,
        )


@functools.lru_cache(maxsize=64)
def elements(spec: ModelSpec) -> int:
    """Of all tensors of the model, once."""
    return sum(math.prod(shape) for shape in hf_shapes(spec).values())


def kv_bytes(cfg: Config, spec: ModelSpec) -> float:
    """Bytes of a token's keys and values on one rank of the engine."""
    engine = cfg.rollout.engine
    heads = max(1, spec.num_key_value_heads // engine.tensor_parallel_size)
    return 2 * spec.num_layers * heads * spec.head_dim * ITEMSIZE[str(engine.dtype)]


def decode_step_seconds(
    cfg: Config, spec: ModelSpec, cluster: Cluster, engine: Engine, running: float, context: float
) -> float:
    """One step of an engine with `running` sequences of `context` tokens."""
    gpu, rates = cluster.gpu, cluster.rates
    tp_v = cfg.rollout.engine.tensor_parallel_size
    kind = kinds_of("rollout", cfg).layers
    memory = (engine.weight_bytes + running * context * engine.kv_bytes) / (gpu.hbm_gb_s * GB * rates.decode_hbm)
    flops = running * (engine.matrices + context * engine.attention) / tp_v
    computing = flops / (gpu.flops(kind) * rates.decode_flops)
    # An all-reduce after attention and after the MLP, twice the data over each link.
    data = 4.0 * running * spec.hidden_size * ITEMSIZE[str(cfg.rollout.engine.dtype)] * spec.num_layers
    traffic = data * (tp_v - 1) / tp_v / cluster.link(tp_v) if tp_v > 1 else 0.0
    launches = 0.0 if cfg.rollout.engine.cuda_graphs == "full_and_piecewise" else rates.launch_s * spec.num_layers
    return max(memory, computing, launches) + traffic


def rollout_seconds(
    cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster, engine: Engine, shape: TreeShape, trees: float
) -> tuple[float, float]:
    """(prefill, decode) of one step's rollout, in which every engine grows its share of `trees` from the start on."""
    of_engine = trees / (layout.world / layout.tp_v)
    prompts = Work(of_engine * shape.prompt, of_engine * shape.prompt * (shape.prompt + 1) / 2, 0)
    flops = forward_flops(spec, prompts)
    kind = kinds_of("rollout", cfg).layers
    prefill = flops.total / layout.tp_v / (cluster.gpu.flops(kind) * cluster.rates.prefill)
    decode = 0.0
    for index, paths in enumerate(shape.paths):
        running = of_engine * paths
        # Below one path the stretch is only reached in some of the steps.
        chance = min(1.0, running)
        context = shape.prompt + (index + 0.5) * shape.stretch
        for batch in batches(max(1.0, running), engine.most_running):
            decode += chance * shape.stretch * decode_step_seconds(cfg, spec, cluster, engine, batch, context)
    return prefill, decode


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
        and not (cfg.loss.logprob_precision == "fp8" and cfg.loss.guard.sample_rows)
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
