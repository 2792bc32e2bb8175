"""The segment-advantage policy loss, stated on masses.

All trajectories through a token share its prefix and its sampled value, so they share the ratio
r = exp(logp - old_logp), and the sum of their PPO-clip terms (min of r*A and clipped r*A, dual clip for
A < 0) depends on their advantages only through the two masses A_pos = sum of positive A, A_neg = sum of
negative A (min distributes over terms with one ratio; `tests/tree/test_credit.py` compares with the sum):

    L = -[ A_pos * min(r, 1 + eps_clip_high) + A_neg * min(max(r, 1 - eps_clip), eps_clip_c) ]

A net advantage A_pos + A_neg would be wrong as soon as r leaves the clip range. KL to the reference,
entropy and importance weights multiply by the multiplicity `n` (or the masses) the same way. A flat
trajectory is the case n = 1, one mass zero.

Its slope is closed form, so that the gradient is known as soon as logp is (`fused.py` relies on it):

    dL/dlogp = -w r (A_pos 1[r <= 1 + eps_clip_high] + A_neg 1[1 - eps_clip <= r <= eps_clip_c]) + coef n dKL/dlogp
    dk1 = 1    dk2 = logp - ref    dk3 = 1 - exp(ref - logp)    dL/dentropy = -entropy_coef n

The loss is a sum over rows; dividing by the number of (trajectory, token) pairs of the global batch
(`token-mean`) is the pipeline's business (Megatron's per-token loss), because only it knows the total.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treepo_mega.config import AlgoConfig
from treepo_mega.loss.stats import Stats

KL_LOG_BOUND = 20.0
"""Largest |ref - logp| that low_var_kl sees, nats."""

KL_BOUND = 10.0
"""Largest estimate of low_var_kl, nats."""


def times(mass: Tensor, x: Tensor) -> Tensor:
    """mass * x per row [N], and 0 where the mass is: a ratio of a row that does not count may have overflowed."""
    # `where` and not a product: inf * 0 would be NaN, and one NaN row spoils the whole step.
    return torch.where(mass == 0, torch.zeros_like(x), mass * x)


def clipped_objective(ratio: Tensor, A_pos: Tensor, A_neg: Tensor, algo: AlgoConfig) -> Tensor:
    """The bracket of the module docstring per row [N], to be maximised."""
    below = ratio.clamp(min=1 - algo.eps_clip)
    if algo.eps_clip_c is not None:
        below = below.clamp(max=algo.eps_clip_c)
    # Only A_neg needs `times`: the positive side's ratio is bounded above, the other one only under a dual clip.
    return A_pos * ratio.clamp(max=1 + algo.eps_clip_high) + times(A_neg, below)


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Estimators of KL(actor || reference) per row [N]: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1, d = ref - logp.

    Source: Schulman, "Approximating KL divergence" (2020). k3 is never negative. low_var_kl is k3 with d bounded by
    20 and the estimate by 10, as verl and slime compute it: one far token cannot own the gradient.
    """
    difference = ref_logp - logp
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference * difference
    if kind == "low_var_kl":
        bounded = difference.clamp(-KL_LOG_BOUND, KL_LOG_BOUND)
        return (bounded.exp() - bounded - 1).clamp(max=KL_BOUND)
    return difference.exp() - difference - 1


def kl_slope(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """d kl_penalty / d logp per row [N]."""
    difference = ref_logp - logp
    if kind == "k1":
        return torch.ones_like(difference)
    if kind == "low_var_kl":
        inside = (difference.abs() <= KL_LOG_BOUND) & (kl_penalty(logp, ref_logp, kind) < KL_BOUND)
        # `where` and not a product: beyond the bounds the exponential may have overflowed.
        return torch.where(inside, 1 - difference.exp(), torch.zeros_like(difference))
    return -difference if kind == "k2" else 1 - difference.exp()


def objective_slope(ratio: Tensor, A_pos: Tensor, A_neg: Tensor, algo: AlgoConfig) -> Tensor:
    """d clipped_objective / d logp per row [N]: A * r where the clip is not active, 0 where it is."""
    zero = torch.zeros_like(ratio)
    low = ratio >= 1 - algo.eps_clip
    if algo.eps_clip_c is not None:
        low &= ratio <= algo.eps_clip_c
    # `where` and not a product: a ratio that overflowed is clipped, and inf * 0 would be NaN.
    pos = torch.where(ratio <= 1 + algo.eps_clip_high, A_pos * ratio, zero)
    return pos + torch.where(low, times(A_neg, ratio), zero)


def weighted_logp(logp: Tensor, ratio: Tensor, A_pos: Tensor, A_neg: Tensor, algo: AlgoConfig) -> Tensor:
    """CISPO's objective per row [N]: the ratio, bounded above and held fixed, weighs A * logp.

    It is linear in A, so the net mass is exact on shared tokens. No token loses its gradient to the clip. Its slope is
    the factor of logp. Source: MiniMax-M1 (2025), eq. 4-5.
    """
    return times(A_pos + A_neg, ratio.clamp(max=1 + algo.eps_clip_high)) * logp


def clip_active(ratio: Tensor, A_pos: Tensor, A_neg: Tensor, algo: AlgoConfig) -> Tensor:
    """Rows [N] at which a gate of the clip has closed for a mass that is not zero, dual clip aside.

    Under CISPO: rows whose weight is at its bound.
    """
    if algo.policy_loss == "cispo":
        return (ratio > 1 + algo.eps_clip_high) & ((A_pos > 0) | (A_neg < 0))
    return ((A_pos > 0) & (ratio > 1 + algo.eps_clip_high)) | ((A_neg < 0) & (ratio < 1 - algo.eps_clip))


class _KernelPolicyLoss(torch.autograd.Function):
    """The same in one Triton kernel; fp32."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor, rows: dict[str, Tensor], algo: AlgoConfig, stats: Stats
    ) -> Tensor:
        """As `_PolicyLoss.forward`."""
        from treepo_mega.loss.triton import launch

        slope, found = launch.policy(logp.detach(), entropy.detach(), rows, algo)
        stats.maxima["max_ratio_diff"] = found.pop("max_ratio_diff")
        stats.sums |= found
        ctx.save_for_backward(slope, rows["n"])
        ctx.entropy_coef = algo.entropy_coef
        return found["loss"].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As `_PolicyLoss.backward`."""
        return _scaled_slopes(ctx, grads[0])


def _scaled_slopes(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    """Slopes times the incoming gradient; entropy gets none when there is no bonus."""
    slope, multiplicity = ctx.saved_tensors
    d_entropy = -ctx.entropy_coef * multiplicity * incoming if ctx.entropy_coef else None
    return slope * incoming, d_entropy, None, None, None


class _PolicyLoss(torch.autograd.Function):
    """The loss [] of rows with its slopes in closed form: one pass, and nothing kept but two vectors [N]."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor, rows: dict[str, Tensor], algo: AlgoConfig, stats: Stats
    ) -> Tensor:
        """`rows`: old, weight, A_pos, A_neg, n, count and, for the KL term, ref, all [N]. Fills `stats`."""
        multiplicity = rows["n"]
        count = rows["count"]
        ratio = (logp - rows["old"]).exp()
        masses = rows["A_pos"], rows["A_neg"], algo
        if algo.policy_loss == "cispo":
            pg = -(rows["weight"] * weighted_logp(logp, ratio, *masses)).sum()
            slope = -rows["weight"] * weighted_logp(torch.ones_like(logp), ratio, *masses)
        else:
            pg = -(rows["weight"] * clipped_objective(ratio, *masses)).sum()
            slope = -rows["weight"] * objective_slope(ratio, *masses)
        kl = torch.zeros_like(pg)
        if "ref" in rows:
            kl = times(multiplicity, kl_penalty(logp, rows["ref"], algo.kl_loss_type)).sum()
            slope += algo.kl_loss_coef * times(multiplicity, kl_slope(logp, rows["ref"], algo.kl_loss_type))
        loss = pg - algo.entropy_coef * (multiplicity * entropy).sum() + algo.kl_loss_coef * kl
        stats.sums |= {
            "loss": loss,
            "pg_loss": pg,
            "kl_loss": kl,
            "entropy": (count * entropy).sum(),
            "pg_clipfrac": (count * clip_active(ratio, *masses)).sum(),
            "ppo_kl": (-count * (logp - rows["old"])).sum(),
            "tis_weight": (count * rows["weight"]).sum(),
        }
        stats.maxima["max_ratio_diff"] = (ratio - 1).abs().max() if len(ratio) else torch.zeros_like(pg)
        # The slope is known now: keeping it spares backward the whole formula, and `rows` can be freed.
        ctx.save_for_backward(slope, multiplicity)
        ctx.entropy_coef = algo.entropy_coef
        # A copy: torch hangs the graph on the returned tensor, and the statistics keep the other one.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of logp and entropy."""
        return _scaled_slopes(ctx, grads[0])


def engine_weight(old_logprobs: Tensor, rollout_logprobs: Tensor, algo: AlgoConfig) -> Tensor:
    """Weight of each row [N] for the engine having sampled from another policy than the trainer's.

    Truncated importance sampling bounds the ratio of a token; IcePop drops the token outside `algo.icepop_range`
    (Ant's Ling team, 2025). Both look at one row, so both are exact on shared tokens. Without them it is 1. Weights of
    whole trajectories stand in the masses (`tree/correction.py`).
    """
    ratio = (old_logprobs - rollout_logprobs).exp()
    by_token = algo.use_tis and not algo.weighs_leaves
    weight = ratio.clamp(algo.tis_clip_low, algo.tis_clip) if by_token else torch.ones_like(ratio)
    if algo.icepop_range is not None:
        low, high = algo.icepop_range
        weight = torch.where((ratio >= low) & (ratio <= high), weight, torch.zeros_like(weight))
    return weight


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
    kernel: bool = False,
    with_kl: bool = True,
) -> tuple[Tensor, Stats]:
    """Sum over rows of policy loss + KL + entropy bonus, and statistics.

    All arguments are [N]; `logp` and `entropy` carry gradients. `n` weighs a row in the loss. `count` weighs it in the
    statistics: the trajectories through it; None: `n`. They differ unless loss_agg_mode is token-mean. `kernel`: in one
    Triton kernel, whose statistics count by `n`. `with_kl` False leaves the KL term to the caller. Raises ValueError
    when a KL term is asked for without reference logprobs.
    """
    weight = engine_weight(old_logprobs, rollout_logprobs, algo)
    rows = {"old": old_logprobs, "weight": weight, "A_pos": A_pos, "A_neg": A_neg, "n": n}
    rows["count"] = n if count is None else count
    if with_kl and algo.kl_loss_coef > 0:
        if ref_logprobs is None:
            raise ValueError("algo.kl_loss_coef > 0 needs reference logprobs: the reference pass did not run")
        rows["ref"] = ref_logprobs
    stats = Stats()
    function = _KernelPolicyLoss if kernel else _PolicyLoss
    return function.apply(logp, entropy, rows, algo, stats), stats


def supervised_loss(logp: Tensor, n: Tensor) -> tuple[Tensor, Stats]:
    """Cross entropy of the targets, summed over rows: -n * logp. For warm starts."""
    loss = -(n * logp).sum()
    return loss, Stats({"loss": loss.detach()})
