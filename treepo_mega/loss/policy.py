"""The segment-advantage policy loss, stated on masses.

All trajectories through a token share its prefix and its sampled value, so they share the ratio
r = exp(logp - old_logp), and the sum of their PPO-clip terms (min of r*A and clipped r*A, dual clip for
A < 0) depends on their advantages only through the two masses A_pos = sum of positive A, A_neg = sum of
negative A (reference: treepo_algorithm 5.3, checked there against the summed loss):

    L = -[ A_pos * min(r, 1 + eps_clip_high) + A_neg * min(max(r, 1 - eps_clip), eps_clip_c) ]

A net advantage A_pos + A_neg would be wrong as soon as r leaves the clip range. KL to the reference,
entropy and importance weights multiply by the multiplicity `n` (or the masses) the same way. A flat
trajectory is the case n = 1, one mass zero.

The loss is a sum over rows; dividing by the number of (trajectory, token) pairs of the global batch
(`token-mean`) is the pipeline's business (Megatron's per-token loss), because only it knows the total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treepo_mega.config import AlgoConfig


def clipped_objective(ratio: Tensor, A_pos: Tensor, A_neg: Tensor, algo: AlgoConfig) -> Tensor:
    """The bracket of the module docstring per row [N], to be maximised."""
    below = ratio.clamp(min=1 - algo.eps_clip)
    if algo.eps_clip_c is not None:
        below = below.clamp(max=algo.eps_clip_c)
    return A_pos * ratio.clamp(max=1 + algo.eps_clip_high) + A_neg * below


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Estimators of KL(actor || reference) per row [N]: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1, d = ref - logp.

    Source: Schulman, "Approximating KL divergence" (2020). k3 is never negative.
    """
    d = ref_logp - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    return d.exp() - d - 1


def policy_loss(
    logp: Tensor,
    entropy: Tensor,
    *,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    A_pos: Tensor,
    A_neg: Tensor,
    n: Tensor,
    algo: AlgoConfig,
    count: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over rows of policy loss + KL + entropy bonus, and sums for logging (to be divided by the pairs).

    A statistic whose name begins with `max_` is a maximum instead.

    All arguments are [N]; `logp` and `entropy` carry gradients. `n` weighs a row in the loss, `count` in the
    statistics (the trajectories through it; None: `n`): they differ unless loss_agg_mode is token-mean. Raises
    ValueError when a KL term is asked for without reference logprobs.
    """
    log_ratio = logp - old_logprobs
    ratio = log_ratio.exp()
    weight = torch.ones_like(n)
    if algo.use_tis:
        weight = (old_logprobs - rollout_logprobs).exp().clamp(max=algo.tis_clip)
    pg = -(weight * clipped_objective(ratio, A_pos, A_neg, algo)).sum()
    loss = pg - algo.entropy_coef * (n * entropy).sum()
    kl = torch.zeros_like(pg)
    if algo.kl_loss_coef > 0:
        if ref_logprobs is None:
            raise ValueError("algo.kl_loss_coef > 0 needs reference logprobs: the reference pass did not run")
        kl = (n * kl_penalty(logp, ref_logprobs, algo.kl_loss_type)).sum()
        loss = loss + algo.kl_loss_coef * kl
    count = n if count is None else count
    with torch.no_grad():
        clipped = ((A_pos > 0) & (ratio > 1 + algo.eps_clip_high)) | ((A_neg < 0) & (ratio < 1 - algo.eps_clip))
        sums = {
            "loss": loss.detach(),
            "pg_loss": pg.detach(),
            "kl_loss": kl.detach(),
            "entropy": (count * entropy).sum(),
            "pg_clipfrac": (count * clipped).sum(),
            "ppo_kl": (-count * log_ratio).sum(),
            "tis_weight": (count * weight).sum(),
            "max_ratio_diff": (ratio - 1).abs().max() if len(ratio) else torch.zeros_like(pg),
        }
    return loss, sums


def supervised_loss(logp: Tensor, n: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of the targets, summed over rows: -n * logp. For warm starts."""
    loss = -(n * logp).sum()
    return loss, {"loss": loss.detach()}
