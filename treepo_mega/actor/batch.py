"""From graded trees to the packs of each optimizer step: advantages, whitening, weights, packing.

Every rank holds the structure and the grades of the same forest and computes the same numbers. Tokens it gets for the
packs of its own data-parallel rank alone (`fetch.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from megatron.core import parallel_state as ps

from treepo_mega.actor.fetch import Draft, fetch
from treepo_mega.actor.forward import count_multiple, padding_multiple
from treepo_mega.actor.model import equal_lengths
from treepo_mega.actor.moe import gathers_tokens
from treepo_mega.config import AlgoConfig, Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import Work
from treepo_mega.plugins import PluginError, is_per_node, plugin_advantages
from treepo_mega.runtime import dist
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.advantage import has_signal, leaf_advantages, whiten
from treepo_mega.tree.credit import Lesson, credit_by_depth
from treepo_mega.tree.deal import Dealt, deal_forest
from treepo_mega.tree.descent import leaf_counts, leaf_shares
from treepo_mega.tree.kl_reward import charge, gather_kl
from treepo_mega.tree.merge import merge, told_alike
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.node_advantage import NODE_ESTIMATORS, node_advantages
from treepo_mega.tree.pack import Batch, StepPlan, lay_out, split_steps
from treepo_mega.tree.segments import Floats, Segments, Sharing
from treepo_mega.tree.thin import Thinned, thin


def advantages(trees: list[Tree], cfg: Config, told: list[list[float]] | None = None) -> list[Floats]:
    """One array a tree: per node under `segment` and `rloo`, else per leaf in the order of `tree.leaves`; under a
    plug-in, as it returns them.

    Whitened over all (trajectory, token) pairs of the rollout when `algo.whiten_advantages` says so. A tree whose
    rewards are all equal compares nothing: it is left out of the whitening and has advantage 0. Under `reinforce_pp`,
    which compares with the batch and not with the tree, it takes part; under a plug-in, unless all it says is 0.

    `told`: what the estimator says of each tree; None: it is asked here. Raises PluginError for a plug-in that answers
    per leaf for one tree and per node for another.
    """
    algo = cfg.algo
    shares = [leaf_shares(tree, algo.leaf_weight) for tree in trees]
    raw = told or [_raw_advantages(tree, of_tree, algo) for tree, of_tree in zip(trees, shares, strict=True)]
    by_plugin = is_function_path(algo.advantage_estimator)
    if by_plugin:
        _require_one_kind(raw, trees, algo.advantage_estimator)
    if algo.whiten_advantages:
        # With a baseline of its own, a tree without signal would only get what whitening takes off the others.
        compares_batch = algo.advantage_estimator == "reinforce_pp"
        teaches = [
            any(values) if by_plugin else compares_batch or has_signal(tree)
            for tree, values in zip(trees, raw, strict=True)
        ]
        chosen = [index for index, take_part in enumerate(teaches) if take_part]
        # As one prompt, a tree counts as many trajectories as trees have on average.
        mean = sum(len(trees[index].leaves) for index in chosen) / max(1, len(chosen))
        counted = mean if algo.tree_weight == "prompt" else None
        pairs = [
            _pairs(trees[index], shares[index], is_per_node(raw[index], trees[index]), counted) for index in chosen
        ]
        flat = iter(whiten(list(itertools.chain(*(raw[index] for index in chosen))), list(itertools.chain(*pairs))))
        for index, take_part in enumerate(teaches):
            raw[index] = list(itertools.islice(flat, len(raw[index]))) if take_part else [0.0] * len(raw[index])
    limit = algo.advantage_clip
    arrays = [np.array(values, np.float64) for values in raw]
    return arrays if limit is None else [np.clip(values, -limit, limit) for values in arrays]


def _raw_advantages(tree: Tree, shares: list[float] | None, algo: AlgoConfig) -> list[float]:
    """Before whitening; per node or per leaf, as the estimator has it."""
    if is_function_path(algo.advantage_estimator):
        return plugin_advantages(algo.advantage_estimator, tree, shares=shares, algo=algo)
    if algo.advantage_estimator in NODE_ESTIMATORS:
        return node_advantages(tree, algo.advantage_estimator, shares=shares, sqrt_n=algo.segment_sqrt_n)
    return leaf_advantages(
        tree,
        algo.advantage_estimator,
        shares=shares,
        reject_zero_std_subgroups=algo.reject_zero_std_subgroups,
        max_subgroup_depth=algo.max_subgroup_depth,
        root_group=algo.root_group,
        divide_by_std=algo.norm_adv_by_std,
    )


def _require_one_kind(values: list[list[float]], trees: list[Tree], name: str) -> None:
    """Raise PluginError when some trees have advantages per node and others per leaf."""
    first: dict[bool, Tree] = {}
    for of_tree, tree in zip(values, trees, strict=True):
        first.setdefault(is_per_node(of_tree, tree), tree)
    if len(first) > 1:
        raise PluginError(
            f"advantage plug-in {name!r} (algo.advantage_estimator) returned one value a node for prompt "
            f"{first[True].prompt_id!r} and one a leaf for prompt {first[False].prompt_id!r}; expected the same for all"
        )


def _pairs(tree: Tree, shares: list[float] | None, per_node: bool, counted: float | None = None) -> list[float]:
    """(trajectory, token) pairs that carry each of the tree's advantages; the root's tokens carry none.

    The tree counts as `counted` trajectories; None: as many as it has.
    """
    width = len(tree.leaves)
    counts = [1.0] * width if shares is None else [share * width for share in shares]
    if counted is not None:
        counts = [count * counted / width for count in counts]
    if not per_node:
        return [count * tree.response_length(leaf) for count, leaf in zip(counts, tree.leaves, strict=True)]
    below = tree.leaves_below()
    below.pop(ROOT, None)
    return [len(node.tokens) * sum(counts[index] for index in below.get(node.id, ())) for node in tree.nodes]


def lesson_of(
    segments: Segments, values: list[Floats], trees: list[Tree], cfg: Config, counts: Floats | None = None
) -> Lesson:
    """What a step teaches; `values` are `advantages` of `trees`, which `segments` are of, in this order.

    `counts` [L]: what each leaf counts. None: as `algo` says.
    """
    algo = cfg.algo
    if counts is None and (of_leaves := leaf_counts(trees, algo.leaf_weight, algo.tree_weight)) is not None:
        counts = np.array(of_leaves, np.float64)
    return Lesson(
        segments,
        np.concatenate(values),
        per_node=any(is_per_node(of_tree, tree) for of_tree, tree in zip(values, trees, strict=True)),
        loss_agg_mode=algo.loss_agg_mode,
        counts=counts,
        max_response_len=cfg.rollout.max_response_len,
    )


def pair_cost(spec: ModelSpec) -> float:
    """FLOPs of one attention pair / FLOPs of one token in the layers' matrices.

    A pair costs 2 products of `head_dim` in each head; a token one product with every matrix of a layer that it meets.
    """
    heads = spec.num_attention_heads
    attention = spec.hidden_size * spec.head_dim * (2 * heads + 2 * spec.num_key_value_heads)
    width = spec.intermediate_size
    if spec.num_experts:
        width = spec.experts_per_token * spec.expert_intermediate_size + spec.shared_expert_intermediate_size
    matrices = attention + 3 * spec.hidden_size * width
    return 2.0 * heads * spec.head_dim / matrices


def plan_batch(batch: Batch, cfg: Config, cost: float = 0.0) -> StepPlan:
    """The packs of `batch` for this rank in the layout that `cfg` describes."""
    return lay_out_batch(batch, deal_batch(batch, cfg, cost), cfg)


def deal_batch(batch: Batch, cfg: Config, cost: float = 0.0) -> Dealt:
    """Who trains what of `batch`, decided from lengths: the same on every rank."""
    return deal_forest(
        batch.segments,
        dp_size=ps.get_data_parallel_world_size(),
        max_tokens=cfg.train.max_tokens_per_gpu,
        count_multiple=count_multiple(cfg),
        pair_cost=cost,
    )


def lay_out_batch(batch: Batch, dealt: Dealt, cfg: Config) -> StepPlan:
    """The packs that `dealt` gives this rank, whose tokens `batch` holds."""
    return lay_out(
        batch,
        dealt,
        dp_rank=ps.get_data_parallel_rank(),
        multiple=padding_multiple(cfg),
        equal_lengths=equal_lengths(cfg),
        on_all_ranks=gathers_tokens(cfg),
        cp_size=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
    )


def sampled_sharing(cfg: Config) -> Sharing:
    """How segments are laid out before equal tokens are merged; credit is given on these."""
    sharing = cfg.train.prefix_sharing
    return "tree" if sharing == "content" else sharing


def plan_rollout(
    trees: list[Tree], cfg: Config, spec: ModelSpec, version: int | None = None
) -> tuple[list[StepPlan], dict[str, float]]:
    """The optimizer steps of this rollout of the model `spec` for this rank, those without trajectories left out; and
    metrics of credit and of tokens. Writes `advantages` into the trees. Collective over all ranks.

    `version`: the step whose weights the actor has; packs then say which rows were sampled with them.
    """
    values = _agreed_advantages(trees, cfg)
    cost = pair_cost(spec)
    drafts: list[Draft] = []
    lessons: list[Lesson] = []
    depth: list[list[float]] = []
    for chosen in _steps(trees, cfg):
        of_step = [trees[i] for i in chosen]
        taught = [values[i] for i in chosen]
        counts = None
        if cfg.algo.update_share < 1:
            fewer = _thinned(of_step, chosen, taught, cfg)
            of_step, chosen, taught, counts = fewer.trees, fewer.prompts, fewer.values, fewer.counts
        segments = Segments.from_trees(of_step, chosen, sampled_sharing(cfg))
        lesson = lesson_of(segments, taught, of_step, cfg, counts)
        credit = lesson.credit()
        depth.append(credit_by_depth(segments, credit))
        if cfg.train.prefix_sharing == "content":
            lesson = replace(lesson, merged=merge(segments, told_alike(of_step)))
        batch = Batch(lesson.laid_out, credit if lesson.merged is None else lesson.merged.credit(credit))
        drafts.append(Draft(of_step, batch, deal_batch(batch, cfg, cost)))
        lessons.append(lesson)
    if not drafts:
        return [], {}
    batches = fetch(drafts, trees, timeout_s=cfg.distributed.timeout_s)
    plans = [
        replace(lay_out_batch(batch, draft.dealt, cfg), lesson=lesson)
        for batch, draft, lesson in zip(batches, drafts, lessons, strict=True)
    ]
    if version is not None:
        for plan, draft in zip(plans, drafts, strict=True):
            _mark_fresh(plan, draft.trees, version)
    chosen_leaves = float(sum(lesson.segments.leaf_count for lesson in lessons))
    return plans, _credit_metrics(depth) | _tokens(plans) | {"tree/leaves_chosen": chosen_leaves}


def _mark_fresh(plan: StepPlan, trees: list[Tree], version: int) -> None:
    """Tell the packs of a plan of `trees` which rows the weights of the step `version` sampled."""
    assert plan.lesson is not None, "plan_rollout gives every plan its lesson"
    # Prompts are sampled by nobody, and have no rows.
    is_fresh = np.array([node.parent < 0 or node.policy_version == version for tree in trees for node in tree.nodes])
    if is_fresh.all():
        return
    of_segment = is_fresh[plan.lesson.laid_out.node]
    for pack in plan.packs:
        pack.fresh = of_segment[pack.segment]


def _thinned(trees: list[Tree], prompts: list[int], values: list[Floats], cfg: Config) -> Thinned:
    """The leaves of a step that train (algo.update_share): the same on every rank, and after a restart."""
    algo = cfg.algo
    # The seeds of a step are not known here; its prompts and the weights that sampled them are.
    names = [f"{tree.prompt_id} {max(node.policy_version for node in tree.nodes)}" for tree in trees]
    start = derive_seed(cfg.train.seed, "update_share", *names) / 2**63
    counts = leaf_counts(trees, algo.leaf_weight, algo.tree_weight)
    return thin(trees, prompts, values, counts, share=algo.update_share, start=start)


def charge_kl(plans: list[StepPlan], trees: list[Tree], cfg: Config) -> dict[str, float]:
    """Take reward.kl_coef times the KL of each leaf off its reward; the plans then teach the advantages of that.

    `plans` are those of `trees`, with old and reference logprobs filled in; both are changed. Returns metrics. Without
    the key nothing happens. Collective over all ranks.
    """
    coef = cfg.reward.kl_coef
    if not coef:
        return {}
    every_kl = []
    for plan, chosen in zip(plans, _steps(trees, cfg), strict=True):
        assert plan.lesson is not None, "plan_rollout gives every plan its lesson"
        segments = plan.lesson.laid_out
        kl = plan.lesson.leaf_sums(dist.sum_array_over_replicas(gather_kl(plan.packs, len(segments))))
        charge([trees[i] for i in chosen], kl, coef)
        every_kl.append(kl)
    # After all steps are charged: whitening is over the whole rollout.
    values = _agreed_advantages(trees, cfg)
    depth = []
    for plan, chosen in zip(plans, _steps(trees, cfg), strict=True):
        assert plan.lesson is not None, "as above"
        plan.lesson = replace(plan.lesson, advantages=np.concatenate([values[i] for i in chosen]))
        depth.append(credit_by_depth(plan.lesson.segments, plan.lesson.credit()))
        credit = plan.lesson.row_credit()
        for pack in plan.packs:
            pack.relearn(credit)
    mean = float(np.concatenate(every_kl).mean())
    return _credit_metrics(depth) | {"reward/kl": mean, "reward/kl_penalty": -coef * mean}


def _agreed_advantages(trees: list[Tree], cfg: Config) -> list[Floats]:
    """`advantages`, written into the trees; all ranks have come to the same. Collective over all ranks."""
    by_plugin = is_function_path(cfg.algo.advantage_estimator)
    values = advantages(trees, cfg, _told_by_plugin(trees, cfg) if by_plugin else None)
    if by_plugin:
        what = f"advantage plug-in {cfg.algo.advantage_estimator!r} (algo.advantage_estimator)"
        dist.require_agreement([array.tolist() for array in values], what)
    for tree, of_tree in zip(trees, values, strict=True):
        tree.advantages = of_tree.tolist()
    return values


def _told_by_plugin(trees: list[Tree], cfg: Config) -> list[list[float]]:
    """What the advantage plug-in says, asked where a tree's contents are; on every rank. Collective over all ranks.

    Raises PluginError on every rank.
    """
    mine: dict[int, list[float]] = {}
    error = None
    try:
        for index, tree in enumerate(trees):
            if tree.home is None or tree.home == dist.rank():
                mine[index] = _raw_advantages(tree, leaf_shares(tree, cfg.algo.leaf_weight), cfg.algo)
    except PluginError as raised:
        # Others wait in the exchange that follows: all must hear of it.
        error = str(raised)
    told = dist.gather_objects({"values": list(mine.items()), "error": error})
    wrong = [of_rank["error"] for of_rank in told if of_rank["error"] is not None]
    if wrong:
        raise PluginError(wrong[0])
    # Last of all this rank's own: what every rank can ask, each has asked for itself.
    of_tree = dict(itertools.chain.from_iterable(of_rank["values"] for of_rank in told)) | mine
    return [of_tree[index] for index in range(len(trees))]


def _steps(trees: list[Tree], cfg: Config) -> list[list[int]]:
    """Indices of the trees with leaves of each optimizer step; steps without any are left out."""
    groups = split_steps(range(len(trees)), cfg.train.num_steps_per_rollout)
    chosen = [[i for i in group if trees[i].leaves] for group in groups]
    # Every rank holds the same forest and so leaves out the same steps: an optimizer step is collective.
    return [group for group in chosen if group]


def _credit_metrics(depth: list[list[float]]) -> dict[str, float]:
    """Where in the path credit falls, mean of the optimizer steps; `depth` as of `credit_by_depth`."""
    return {f"tree/credit_q{q + 1}": float(x) for q, x in enumerate(np.mean(depth, axis=0))}


def work_of(plans: Sequence[StepPlan]) -> Work:
    """What one pass over the packs of all data-parallel ranks computes. Collective over all ranks."""
    total = _count(plans)
    # Ancestors that a cut tree repeats are computed, and so they are counted.
    return Work(total["real"], total["pairs"], total["rows"], unique=total["real"], flat=total["flat"])


def _count(plans: Sequence[StepPlan]) -> dict[str, float]:
    """Tokens, attention pairs and rows of the packs of all data-parallel ranks. Collective over all ranks."""
    counts = {"real": 0.0, "padded": 0.0, "flat": 0.0}
    pairs = 0.0
    # Context-parallel ranks hold the tokens of a pack together, but its rows apart.
    if ps.get_context_parallel_rank() == 0:
        counts = {name: float(sum(getattr(plan, f"{name}_tokens") for plan in plans)) for name in counts}
        pairs = float(sum(pack.attention_pairs for plan in plans for pack in plan.packs))
    counts |= {"pairs": pairs, "rows": float(sum(len(pack.target) for plan in plans for pack in plan.packs))}
    return dist.sum_over_replicas(counts, counts=ps.get_pipeline_model_parallel_rank() == 0)


def _tokens(plans: list[StepPlan]) -> dict[str, float]:
    """What the packs of all data-parallel ranks hold. Collective over all ranks."""
    total = _count(plans)
    return {
        "perf/packed_tokens": total["real"],
        "perf/packed_token_ratio": total["real"] / max(1.0, total["flat"]),
        "perf/padding_share": 1 - total["real"] / max(1.0, total["padded"]),
        "perf/loss_rows": total["rows"],
    }
