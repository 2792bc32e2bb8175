"""How far the engine's policy is from the trainer's on sampled tokens, under the names that the field compares.

    sums = mismatch_sums(actor, engine, count, depth)       # of some rows; add them up over rows, ranks and steps
    metrics = mismatch_metrics({name: float(total) for name, total in sums.items()})

With d = actor - engine, nats, of a token that the engine sampled, means over (trajectory, token) pairs:

    token_mult_prob_error       e^|d|
    gen_kl_error                e^d - d - 1, an estimate of KL(engine || actor)
    policy_kl_error             e^-d + d - 1, the same estimator with the two exchanged
    js_divergence_error         mean of that estimator from each of the two to their even mixture
    sampling_importance_ratio   e^d
    is_eff_sample_size          (sum of e^d)^2 / (pairs x sum of e^2d): 1 where all ratios are equal

A shared token counts once for every trajectory through it, so that a tree has the figures of its trajectories one by
one. Sources: NVIDIA NeMo-RL, "GRPO", section on metrics, and its clipped policy-gradient loss, whose `kl_type` is k3;
for the last, Kish, "Survey Sampling" (1965), as verl's rollout correction reports it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

MISMATCH = "mismatch"
"""Sums of these names are divided by pairs of their own, not by those of the step."""

LOG_BOUND = 20.0
"""Largest |d| that enters a mean, nats: one token of another model must not make it infinite."""

PAIRS = "mismatch_pairs"
MEANS = ("token_mult_prob_error", "gen_kl_error", "policy_kl_error", "js_divergence_error", "sampling_importance_ratio")
SQUARES = "squared_ratio"
LIMITS = (0.001, 0.01, 0.1, 1.0)
"""Ranges of |d| whose shares of the pairs are told, nats: up to each, and more than the last."""
BEYOND = "more"
DEPTHS = (1, 2, 4, 8)
"""Segments between the prompt and a token, that one included: each range ends before the next begins."""


def mismatch_sums(actor: Tensor, engine: Tensor, count: Tensor, depth: Tensor) -> dict[str, Tensor]:
    """Sums [] over rows: `actor` and `engine` logprobs [N], `count` [N] trajectories through each, `depth` [N].

    Works on no rows at all.
    """
    # A row that counts nothing may hold anything: 0 * NaN would spoil the sums.
    apart = torch.where(count > 0, actor - engine, torch.zeros_like(actor)).clamp(-LOG_BOUND, LOG_BOUND)
    ratio = apart.exp()
    gen_kl = _k3(apart)
    # ln(m / engine) and ln(m / actor) of the mixture m; `log1p` and `expm1` keep the digits of small differences.
    above_engine, above_actor = (torch.log1p(torch.expm1(side) / 2) for side in (apart, -apart))
    divergence = (_k3(-above_engine) + _k3(-above_actor)) / 2
    terms = torch.stack([apart.abs().exp(), gen_kl, _k3(-apart), divergence, ratio, ratio * ratio])
    sums = dict(zip((*MEANS, SQUARES), (terms @ count).unbind(), strict=True)) | {"pairs": count.sum()}
    distance = apart.abs()
    beyond = torch.stack([distance > limit for limit in LIMITS]).to(count.dtype) @ count
    sums |= {f"beyond_{limit:g}": value for limit, value in zip(LIMITS, beyond.unbind(), strict=True)}
    # Comparisons with numbers, and no table of the ranges: it would come from the host, and the device wait for it.
    reached = [depth >= least for least in DEPTHS]
    inside = [*(here & ~beyond for here, beyond in itertools.pairwise(reached)), reached[-1]]
    of_depth = torch.stack(inside).to(count.dtype) * count
    for name, values in (("gen_kl_error", (of_depth * gen_kl).sum(1)), ("pairs", of_depth.sum(1))):
        sums |= {f"{name}_depth_{least}": value for least, value in zip(DEPTHS, values.unbind(), strict=True)}
    return {f"{MISMATCH}_{name}": value for name, value in sums.items()}


def share_names() -> list[str]:
    """Metrics of the shares of pairs by |d|, ascending.

    >>> share_names()[0], share_names()[-1]
    ('train/log_ratio_share_0.001', 'train/log_ratio_share_more')
    """
    return [f"train/log_ratio_share_{limit}" for limit in (*(f"{limit:g}" for limit in LIMITS), BEYOND)]


def _k3(log_ratio: Tensor) -> Tensor:
    """e^x - x - 1 per row [N]: never negative in exact arithmetic."""
    # `expm1` and not `exp - 1`: of differences below 1e-4 fp32 would leave nothing.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0)


def mismatch_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """`train/` metrics of summed `mismatch_sums`; nothing where no pair was compared, nor for a depth without any.

    >>> from math import log
    >>> rows = [torch.tensor(values) for values in ([log(0.5), log(0.25)], [log(0.25), log(0.25)], [3.0, 1.0], [1, 2])]
    >>> found = mismatch_metrics({name: float(total) for name, total in mismatch_sums(*rows).items()})
    >>> round(found["train/token_mult_prob_error"], 4), round(found["train/is_eff_sample_size"], 4)
    (1.75, 0.9423)
    """
    pairs = sums.get(PAIRS, 0.0)
    if not pairs:
        return {}
    out = {f"train/{name}": sums[f"{MISMATCH}_{name}"] / pairs for name in MEANS}
    ratios = sums[f"{MISMATCH}_sampling_importance_ratio"]
    out["train/is_eff_sample_size"] = ratios**2 / (pairs * sums[f"{MISMATCH}_{SQUARES}"])
    above = [pairs, *(sums[f"{MISMATCH}_beyond_{limit:g}"] for limit in LIMITS), 0.0]
    for name, (more, fewer) in zip(share_names(), itertools.pairwise(above), strict=True):
        out[name] = (more - fewer) / pairs
    for least in DEPTHS:
        if pairs_there := sums[f"{PAIRS}_depth_{least}"]:
            out[f"train/gen_kl_error_depth_{least}"] = sums[f"{MISMATCH}_gen_kl_error_depth_{least}"] / pairs_there
    return out
