"""The phases of a step in seconds, one table. Pure.

times = phase_seconds(cfg, spec, layout, cluster, lengths, held=..., kv_budget=..., refit_s=...)
times["update"], sum(times.values())
"""

from __future__ import annotations

from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import UPDATE
from treepo_mega.plan.engine import Engine, rollout_load, waves
from treepo_mega.plan.layout import Held, Layout
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.timing import (
    GB,
    Cluster,
    micro_batches,
    old_share,
    pass_seconds,
    training_work,
    update_seconds,
)
from treepo_mega.plan.work import TreeShape

PHASES = ("rollout", "reward", "old_logprobs", "ref_logprobs", "update", "reshard", "handover", "checkpoint")
"""In the order in which a step goes through them; as in the `timing_s/` metrics, but for handover, part of reshard."""


def tree_shape(cfg: Config, lengths: Lengths) -> TreeShape:
    """The trees that a step expects."""
    return TreeShape.of(cfg, response=lengths.response, prompt=lengths.prompt, spread=lengths.spread, tail=lengths.tail)


def phase_seconds(
    cfg: Config,
    spec: ModelSpec,
    layout: Layout,
    cluster: Cluster,
    lengths: Lengths,
    *,
    held: Held,
    kv_budget: float,
    refit_s: float,
) -> dict[str, float]:
    """Seconds of each of PHASES. `held`, `kv_budget`: bytes of the fullest rank; `refit_s`: of the links alone."""
    rates = cluster.rates
    shape = tree_shape(cfg, lengths)
    work = lengths.trained * training_work(cfg, shape)
    engine = Engine.of(cfg, spec, kv_budget, shape.prompt + shape.response / 2)
    load = rollout_load(cfg, spec, layout, cluster, engine, shape, lengths)
    forward = pass_seconds(cfg, spec, layout, cluster, work, phase="old_logprobs", passes=1)
    steps_a_rollout = cfg.train.num_steps_per_rollout
    # Micro-batches of a stage follow each other, each through its share of the layers.
    of_passes = steps_a_rollout * micro_batches(cfg, layout, work) * rates.micro_batch_s * spec.num_layers / layout.pp
    # A forward pass has a third of an update's operations, and so of its launches.
    forward = rates.forward * (forward + of_passes / UPDATE)
    passes, steps = update_seconds(cfg, spec, layout, cluster, work, held)
    times = dict.fromkeys(PHASES, 0.0)
    times["rollout"] = load.seconds
    times["reward"] = rates.reward_s * shape.leaves * sum(waves(cfg, lengths.kept))
    times["old_logprobs"] = old_share(cfg) * forward
    times["ref_logprobs"] = forward if cfg.needs_reference else 0.0
    times["update"] = passes + steps + cfg.train.ppo_epochs * (of_passes + steps_a_rollout * rates.pass_s)
    times["reshard"] = rates.refit * refit_s
    if not cluster.gpu.is_cpu:
        # The optimizer's state goes to the host and back; gradients come back as zeros.
        times["handover"] = 2 * held.optimizer / (cluster.gpu.host_gb_s * rates.host_copy * GB)
    if cfg.checkpoint.enabled and cfg.checkpoint.save_interval:
        # All ranks write their part: a replica's parameters, and the whole optimizer state.
        every = layout.dp * layout.cp
        of_node = (held.optimizer + held.parameters / every) * cluster.ranks_per_node
        times["checkpoint"] = of_node / (rates.storage_gb_s * GB) / cfg.checkpoint.save_interval
    return times
