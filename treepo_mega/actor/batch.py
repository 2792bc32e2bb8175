"""From graded trees to the packs of each optimizer step: advantages, whitening, packing.

Every rank holds the same forest and computes the same numbers; only the packs differ by data-parallel rank.
"""

from __future__ import annotations

from treepo_mega.actor.forward import count_multiple, padding_multiple
from treepo_mega.config import Config
from treepo_mega.runtime import cpu_megatron
from treepo_mega.tree.advantage import leaf_advantages, whiten
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import StepPlan, Trajectory, plan_step, split_steps

cpu_megatron.install()

from megatron.core import parallel_state as ps  # noqa: E402


def trajectories(trees: list[Tree], cfg: Config) -> list[Trajectory]:
    """Every trajectory of the forest with its advantage, whitened over all of them when the config says so."""
    a = cfg.algo
    raw = [
        x
        for t in trees
        for x in leaf_advantages(t, a.advantage_estimator, reject_zero_std_subgroups=a.reject_zero_std_subgroups)
    ]
    paths = [(i, t, leaf) for i, t in enumerate(trees) for leaf in t.leaves]
    responses = [t.response(leaf) for _, t, leaf in paths]
    advantages = whiten(raw, [len(r) for r in responses]) if a.whiten_advantages else raw
    return [
        Trajectory(i, t.prompt_tokens + response, len(t.prompt_tokens), advantage, t.response_logprobs(leaf))
        for (i, t, leaf), response, advantage in zip(paths, responses, advantages, strict=True)
    ]


def plan_rollout(trees: list[Tree], cfg: Config) -> list[StepPlan]:
    """The optimizer steps of this rollout for this data-parallel rank; steps without trajectories are left out."""
    groups = split_steps(trajectories(trees, cfg), cfg.train.num_steps_per_rollout)
    return [
        plan_step(
            group,
            dp_size=ps.get_data_parallel_world_size(),
            dp_rank=ps.get_data_parallel_rank(),
            max_tokens=cfg.train.max_tokens_per_gpu,
            multiple=padding_multiple(cfg),
            count_multiple=count_multiple(cfg),
        )
        for group in groups
        if group
    ]
