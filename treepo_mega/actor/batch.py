"""From graded trees to the packs of each optimizer step: advantages, whitening, weights, packing.

Every rank holds the same forest and computes the same numbers; only the packs differ by data-parallel (and
context-parallel) rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from treepo_mega.actor.forward import count_multiple, equal_lengths, padding_multiple
from treepo_mega.config import Config, read_hf_config
from treepo_mega.runtime import cpu_megatron, dist
from treepo_mega.tree.advantage import leaf_advantages, segment_advantages, whiten
from treepo_mega.tree.credit import Credit, credit_by_depth, fold, fold_nodes, leaf_weights
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch, StepPlan, plan_step, split_steps
from treepo_mega.tree.segments import Floats, Segments

cpu_megatron.install()

from megatron.core import parallel_state as ps  # noqa: E402


@dataclass(slots=True)
class Advantages:
    """Of all trees: per leaf (`per_node` False) or per node, one array a tree."""

    values: list[Floats]
    per_node: bool

    def fold(self, s: Segments, chosen: list[int], weights: Floats) -> Credit:
        """Masses of the segments `s`, which are of the trees `chosen`."""
        values = np.concatenate([self.values[i] for i in chosen])
        return (fold_nodes if self.per_node else fold)(s, values, weights)


def advantages(trees: list[Tree], cfg: Config) -> Advantages:
    """What `algo` says, whitened over all (trajectory, token) pairs of the rollout when the config says so."""
    a = cfg.algo
    per_node = a.advantage_estimator == "segment"
    if per_node:
        raw = [segment_advantages(t, sqrt_n=a.segment_sqrt_n) for t in trees]
        sizes = [[len(n.tokens) * k for n, k in zip(t.nodes, _leaves_below(t), strict=True)] for t in trees]
    else:
        reject = a.reject_zero_std_subgroups
        raw = [leaf_advantages(t, a.advantage_estimator, reject_zero_std_subgroups=reject) for t in trees]
        sizes = [[len(t.response(leaf)) for leaf in t.leaves] for t in trees]
    if a.whiten_advantages:
        flat = whiten([x for r in raw for x in r], [n for s in sizes for n in s])
        bounds = np.cumsum([0, *(len(r) for r in raw)])
        return Advantages([np.array(flat[i:j]) for i, j in itertools.pairwise(bounds)], per_node)
    return Advantages([np.array(r, np.float64) for r in raw], per_node)


def _leaves_below(tree: Tree) -> list[int]:
    """Leaves at or below each node; 0 for the root, whose tokens carry no advantage."""
    below = [0] * len(tree.nodes)
    for leaf in tree.leaves:
        for node in tree.ancestry(leaf)[1:]:
            below[node] += 1
    return below


def pair_cost(cfg: Config) -> float:
    """FLOPs of one attention pair / FLOPs of one token in the layers' matrices, from the model's config.json."""
    hf = read_hf_config(cfg.model.hf_checkpoint)
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    dim = hf.get("head_dim") or hidden // heads
    groups = hf.get("num_key_value_heads") or heads
    matrices = hidden * dim * (2 * heads + 2 * groups) + 3 * hidden * hf["intermediate_size"]
    return 2.0 * heads * dim / matrices


def plan_batch(batch: Batch, cfg: Config, cost: float = 0.0) -> StepPlan:
    """The packs of `batch` for this rank in the layout that `cfg` describes."""
    return plan_step(
        batch,
        dp_size=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        max_tokens=cfg.train.max_tokens_per_gpu,
        multiple=padding_multiple(cfg),
        count_multiple=count_multiple(cfg),
        equal_lengths=equal_lengths(cfg),
        pair_cost=cost,
        cp_size=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
    )


def plan_rollout(trees: list[Tree], cfg: Config) -> tuple[list[StepPlan], dict[str, float]]:
    """The optimizer steps of this rollout for this rank, those without trajectories left out; and metrics of
    credit and of tokens. Collective over all ranks."""
    a, plans, depth = advantages(trees, cfg), [], []
    cost = pair_cost(cfg)
    for group in split_steps(range(len(trees)), cfg.train.num_steps_per_rollout):
        chosen = [i for i in group if trees[i].leaves]
        if not chosen:
            continue
        s = Segments.from_trees([trees[i] for i in chosen], chosen, cfg.train.prefix_sharing)
        credit = a.fold(s, chosen, leaf_weights(cfg.algo.loss_agg_mode, s.flat_lengths()))
        plans.append(plan_batch(Batch(s, credit), cfg, cost))
        depth.append(credit_by_depth(s, credit))
    if not plans:
        return [], {}
    return plans, {f"tree/credit_q{q + 1}": float(x) for q, x in enumerate(np.mean(depth, axis=0))} | _tokens(plans)


def _tokens(plans: list[StepPlan]) -> dict[str, float]:
    """What the packs of all data-parallel ranks hold. Collective over all ranks."""
    counts = {"real": 0.0, "padded": 0.0, "flat": 0.0, "rows": 0.0}
    if ps.get_tensor_model_parallel_rank() == 0 and ps.get_pipeline_model_parallel_rank() == 0:
        counts["rows"] = float(sum(len(p.target) for plan in plans for p in plan.packs))
        if ps.get_context_parallel_rank() == 0:
            for name in ("real", "padded", "flat"):
                counts[name] = float(sum(getattr(plan, f"{name}_tokens") for plan in plans))
    total = dist.sum_over_ranks(counts)
    return {
        "perf/packed_tokens": total["real"],
        "perf/packed_token_ratio": total["real"] / max(1.0, total["flat"]),
        "perf/padding_share": 1 - total["real"] / max(1.0, total["padded"]),
        "perf/loss_rows": total["rows"],
    }
