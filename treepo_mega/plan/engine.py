"""Seconds of a rollout: steps of an engine that grows its trees, summed over the depths of those trees. Pure.

    load = rollout_load(cfg, spec, layout, cluster, engine, shape, lengths)
    load.steps, load.requests, load.seconds          # of one engine, in one step of the trainer

A decode step reads the weights and the batch's keys and values, or multiplies, whichever takes longer, and launches its
kernels. Where a run was measured (`calibrate.py`), a step costs what it cost there, and each of its tokens too. The
trees of a wave start together, so that a long tail of few paths costs what it does; prompts without signal are replaced
in the next wave.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import hf_shapes
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import Work, forward_flops
from treepo_mega.monitor.workload import kinds_of
from treepo_mega.plan.layout import ITEMSIZE, Layout
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.timing import GB, Cluster
from treepo_mega.plan.work import TreeShape, batches

LEAST_WAVE = 0.05
"""Prompts below which a wave is none."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What a decode step depends on. Bytes are of one rank of the engine."""

    weight_bytes: float
    """But those of experts."""
    expert_bytes: float
    """Of all experts of all layers."""
    taken: float
    """Share of the experts that a token takes."""
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
        experts = 3 * spec.num_layers * spec.num_experts * spec.hidden_size * spec.expert_intermediate_size
        fits = max(1.0, kv_budget / kv / max(1.0, mean_context))
        return cls(
            (elements(spec) - experts) * itemsize / tp_v,
            experts * itemsize / tp_v,
            spec.experts_per_token / max(1, spec.num_experts),
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
    flops = running * (engine.matrices + context * engine.attention) / tp_v
    computing = flops / (gpu.flops(kind) * rates.decode_flops)
    # An all-reduce after attention and after the MLP, twice the data over each link.
    data = 4.0 * running * spec.hidden_size * ITEMSIZE[str(cfg.rollout.engine.dtype)] * spec.num_layers
    traffic = data * (tp_v - 1) / tp_v / cluster.link(tp_v) if tp_v > 1 else 0.0
    if rates.engine_step_s:
        return rates.engine_step_s * spec.num_layers + computing + traffic
    # Of the experts a step reads those that some token takes; each is taken equally often.
    weights = engine.weight_bytes + engine.expert_bytes * (1 - (1 - engine.taken) ** running)
    memory = (weights + running * context * engine.kv_bytes) / (gpu.hbm_gb_s * GB * rates.decode_hbm)
    launches = 0.0 if cfg.rollout.engine.cuda_graphs == "full_and_piecewise" else rates.launch_s * spec.num_layers
    return max(memory, computing, launches) + traffic


@dataclass(frozen=True, slots=True)
class RolloutLoad:
    """What an engine does for one step of the trainer. `steps`: of decoding; `seconds`: of everything."""

    steps: float
    requests: float
    seconds: float


def waves(cfg: Config, kept: float) -> Iterator[float]:
    """Expected prompts that begin together: a step's first, those that replace what had no signal, and so on.

    Below 1: the probability that one begins. Where what is left over trains later (rollout.surplus), a step begins no
    more than it trains in the mean.
    """
    rollout = cfg.rollout
    missing = float(rollout.rollout_batch_size)
    begun = missing * rollout.oversample
    left = begun * (1 + rollout.max_refills) if rollout.dynamic_sampling else begun
    if rollout.surplus == "carry":
        begun = min(begun, missing / kept)
    while begun >= LEAST_WAVE:
        yield begun
        left -= begun
        missing -= kept * begun
        begun = min(left, missing)


def rollout_load(
    cfg: Config, spec: ModelSpec, layout: Layout, cluster: Cluster, engine: Engine, shape: TreeShape, lengths: Lengths
) -> RolloutLoad:
    """Of one engine, which grows its share of every wave, one wave after the other."""
    rates = cluster.rates
    engines = layout.world / layout.tp_v
    steps = decode = begun = 0.0
    for wave in waves(cfg, lengths.kept):
        begun += wave / engines
        # A rollout ends with its last engine, which has a tree as long as there is one.
        trees = max(1.0, wave / engines)
        for index, paths in enumerate(shape.paths):
            running = lengths.sampled * trees * paths
            # Below one path the stretch is only reached in some of the steps.
            often = min(1.0, wave) * min(1.0, running) * shape.stretch * lengths.steps
            context = shape.prompt + (index + 0.5) * shape.stretch
            for batch in batches(max(1.0, running), engine.most_running):
                steps += often
                # What is sampled does not depend on the number of steps in which it is.
                in_step = batch / lengths.steps if rates.engine_step_s else batch
                decode += often * decode_step_seconds(cfg, spec, cluster, engine, in_step, context)
    prompts = Work(begun * shape.prompt, begun * shape.prompt * (shape.prompt + 1) / 2, 0)
    kind = kinds_of("rollout", cfg).layers
    prefill = forward_flops(spec, prompts).total / layout.tp_v / (cluster.gpu.flops(kind) * rates.prefill)
    requests = begun * shape.requests * lengths.requests
    beside = requests * rates.request_s + begun * rates.prompt_s
    return RolloutLoad(steps, requests, rates.rollout * (prefill + decode + beside))
