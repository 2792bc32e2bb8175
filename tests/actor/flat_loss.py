"""The loss of a trajectory, what it counts, and how trajectories are averaged: by definition, without masses.

Written out as the papers have it, one trajectory at a time. What training on trees computes must equal it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from treepo_mega.config import AlgoConfig
from treepo_mega.tree.node import Tree


def shares(tree: Tree, algo: AlgoConfig) -> list[float]:
    """What each leaf counts, by definition: alike, or the chance of a walk that draws among children with a leaf below;
    and beside other trees as many samples as the tree has leaves, or one."""
    width = len(tree.leaves)
    if algo.leaf_weight == "uniform":
        return [1 / width if algo.tree_weight == "prompt" else 1.0] * width
    alive = {node for leaf in tree.leaves for node in tree.ancestry(leaf)}
    chances = []
    for leaf in tree.leaves:
        above = [tree.nodes[node] for node in tree.ancestry(leaf) if node != leaf]
        chances.append(math.prod(1 / len([child for child in node.children if child in alive]) for node in above))
    return [chance * width if algo.tree_weight == "leaves" else chance for chance in chances]


def ratio_of(log_ratios: Tensor, level: str) -> float:
    """The importance ratio of a trajectory, bounded as verl bounds it."""
    total = float(log_ratios.sum())
    if level == "geometric" and len(log_ratios):
        total /= len(log_ratios)
    return math.exp(min(max(total, -20.0), 20.0))


def is_kept(log_ratios: Tensor, algo: AlgoConfig) -> bool:
    """Whether the trajectory is trained on."""
    veto, level = algo.rollout_token_veto_threshold, algo.rollout_rs
    if veto is not None and (log_ratios < math.log(veto)).any():
        return False
    low = algo.rollout_rs_threshold_lower or 1 / algo.rollout_rs_threshold
    return level is None or low <= ratio_of(log_ratios, level) <= algo.rollout_rs_threshold


def weights_of(log_ratios: Tensor, algo: AlgoConfig) -> Tensor:
    """What each token's policy term is multiplied with."""
    ratio = log_ratios.exp()
    weight = torch.ones_like(ratio)
    if algo.use_tis and algo.rollout_is in (None, "token"):
        weight = ratio.clamp(algo.tis_clip_low, algo.tis_clip)
    elif algo.use_tis:
        weight = weight * min(max(ratio_of(log_ratios, str(algo.rollout_is)), algo.tis_clip_low), algo.tis_clip)
    if algo.icepop_range is not None:
        weight = weight * ((ratio >= algo.icepop_range[0]) & (ratio <= algo.icepop_range[1]))
    return weight


def trajectory_loss(
    logp: Tensor, entropy: Tensor, known: dict[str, Tensor], advantages: Tensor, algo: AlgoConfig
) -> Tensor:
    """The loss of each token [l] of one trajectory; `known` are its old, ref and rollout logprobs, all [l]."""
    change = logp - known["old"]
    if algo.ratio_level == "sequence" and len(change):
        # The value of the mean, the gradient of the token's own logprob, as verl has it.
        change = change - change.detach() + change.detach().mean()
    ratio = change.exp()
    if algo.policy_loss == "cispo":
        term = ratio.detach().clamp(max=1 + algo.eps_clip_high) * advantages * logp
    else:
        term = torch.minimum(ratio * advantages, ratio.clamp(1 - algo.eps_clip, 1 + algo.eps_clip_high) * advantages)
        if algo.eps_clip_c is not None:
            term = torch.where(advantages < 0, torch.maximum(term, algo.eps_clip_c * advantages), term)
    d = known["ref"] - logp
    k3 = d.exp() - d - 1
    kl = {"k1": -d, "k2": 0.5 * d * d, "k3": k3, "low_var_kl": k3.clamp(max=10)}[algo.kl_loss_type]
    weighed = weights_of(known["old"] - known["rollout"], algo) * term
    return -weighed + algo.kl_loss_coef * kl - algo.entropy_coef * entropy


def aggregate(per_token: list[Tensor], counts: list[float], mode: str, longest: int) -> Tensor:
    """`loss_agg_mode`, by its definition; `counts` are what trajectories count. Those without tokens count nothing."""
    filled = [(x, count) for x, count in zip(per_token, counts, strict=True) if len(x)]
    if mode == "token-mean":
        return torch.stack([count * x.sum() for x, count in filled]).sum() / sum(count * len(x) for x, count in filled)
    size = longest if mode == "seq-mean-token-sum-norm" else 1
    each = [count * (x.mean() if mode == "seq-mean-token-mean" else x.sum() / size) for x, count in filled]
    return torch.stack(each).sum() / sum(count for _, count in filled)
