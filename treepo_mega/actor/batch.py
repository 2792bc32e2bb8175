"""From graded trees to the packs of each optimizer step: advantages, whitening, weights, packing.

Every rank holds the same forest and computes the same numbers; only the packs differ by data-parallel (and
context-parallel) rank.
"""

from __future__ import annotations

import itertools

import numpy as np
from megatron.core import parallel_state as ps

from treepo_mega.actor.forward import count_multiple, equal_lengths, padding_multiple
from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.tree.advantage import leaf_advantages, segment_advantages, whiten
from treepo_mega.tree.credit import Credit, credit_by_depth, fold, fold_nodes, leaf_weights
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.pack import Batch, StepPlan, plan_step, split_steps
from treepo_mega.tree.segments import Floats, Segments


def advantages(trees: list[Tree], cfg: Config) -> list[Floats]:
    """One array a tree: per node under the `segment` estimator, else per leaf in the order of `tree.leaves`.

    Whitened over all (trajectory, token) pairs of the rollout when `algo.whiten_advantages` says so.
    """
    algo = cfg.algo
    if algo.advantage_estimator == "segment":
        raw = [segment_advantages(tree, sqrt_n=algo.segment_sqrt_n) for tree in trees]
        pairs = [_pairs_of_nodes(tree) for tree in trees]
    else:
        reject = algo.reject_zero_std_subgroups
        raw = [leaf_advantages(tree, algo.advantage_estimator, reject_zero_std_subgroups=reject) for tree in trees]
        pairs = [[len(tree.response(leaf)) for leaf in tree.leaves] for tree in trees]
    if not algo.whiten_advantages:
        return [np.array(values, np.float64) for values in raw]
    flat = whiten(list(itertools.chain(*raw)), list(itertools.chain(*pairs)))
    bounds = np.cumsum([0, *(len(values) for values in raw)])
    return [np.array(flat[start:end]) for start, end in itertools.pairwise(bounds)]


def _pairs_of_nodes(tree: Tree) -> list[int]:
    """(trajectory, token) pairs of each node; 0 for the root, whose tokens carry no advantage."""
    below = tree.leaves_below()
    below.pop(ROOT, None)
    return [len(node.tokens) * len(below.get(node.id, ())) for node in tree.nodes]


def credit_of(segments: Segments, values: list[Floats], cfg: Config) -> Credit:
    """Masses per segment; `values` are `advantages` of the trees that `segments` are of, in their order."""
    fold_them = fold_nodes if cfg.algo.advantage_estimator == "segment" else fold
    weights = leaf_weights(cfg.algo.loss_agg_mode, segments.flat_lengths())
    return fold_them(segments, np.concatenate(values), weights)


def pair_cost(spec: ModelSpec) -> float:
    """FLOPs of one attention pair / FLOPs of one token in the layers' matrices.

    A pair costs 2 products of `head_dim` in each head; a token one product with every matrix of a layer.
    """
    heads = spec.num_attention_heads
    attention = spec.hidden_size * spec.head_dim * (2 * heads + 2 * spec.num_key_value_heads)
    matrices = attention + 3 * spec.hidden_size * spec.intermediate_size
    return 2.0 * heads * spec.head_dim / matrices


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
    values = advantages(trees, cfg)
    cost = pair_cost(ModelSpec.from_hf(cfg.model.hf_checkpoint))
    plans: list[StepPlan] = []
    depth: list[list[float]] = []
    for group in split_steps(range(len(trees)), cfg.train.num_steps_per_rollout):
        chosen = [i for i in group if trees[i].leaves]
        if not chosen:
            continue
        segments = Segments.from_trees([trees[i] for i in chosen], chosen, cfg.train.prefix_sharing)
        credit = credit_of(segments, [values[i] for i in chosen], cfg)
        plans.append(plan_batch(Batch(segments, credit), cfg, cost))
        depth.append(credit_by_depth(segments, credit))
    if not plans:
        return [], {}
    return plans, {f"tree/credit_q{q + 1}": float(x) for q, x in enumerate(np.mean(depth, axis=0))} | _tokens(plans)


def _tokens(plans: list[StepPlan]) -> dict[str, float]:
    """What the packs of all data-parallel ranks hold. Collective over all ranks."""
    counts = {"real": 0.0, "padded": 0.0, "flat": 0.0}
    # Context-parallel ranks hold the tokens of a pack together, but its rows apart.
    if ps.get_context_parallel_rank() == 0:
        counts = {name: float(sum(getattr(plan, f"{name}_tokens") for plan in plans)) for name in counts}
    counts["rows"] = float(sum(len(pack.target) for plan in plans for pack in plan.packs))
    total = dist.sum_over_replicas(counts, counts=ps.get_pipeline_model_parallel_rank() == 0)
    return {
        "perf/packed_tokens": total["real"],
        "perf/packed_token_ratio": total["real"] / max(1.0, total["flat"]),
        "perf/padding_share": 1 - total["real"] / max(1.0, total["padded"]),
        "perf/loss_rows": total["rows"],
    }
