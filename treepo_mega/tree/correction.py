"""What a trajectory counts because the engine sampled it from another policy than the trainer's. Pure NumPy.

    evidence = gather_evidence(packs, segments, algo)       # of this rank's rows; summed over ranks by the caller
    verdict = judge(lesson, evidence, algo)
    credit = lesson.row_credit(verdict.factors, verdict.kept)   # and `pack.relearn(credit)`

The ratio of a trajectory is the product of its tokens' ratios trainer / engine (`sequence`), or their geometric mean
(`geometric`). Truncated importance sampling weighs the trajectory by it, rejection drops the trajectory where it is out
of range, and a veto drops it for one token that the trainer holds for impossible. Each is a number a leaf, so each is
exact on shared tokens: a token's masses sum what the leaves below it count.

The tokens of a trajectory lie in several packs: a tree may be cut, and context-parallel ranks share rows. So ratios are
summed by segment, over packs and ranks, and then along paths. Where equal tokens of siblings were merged, all have the
engine logprob of the first: engines give equal prefixes equal logprobs, up to the rounding of a batch.

Sources: Liu, Li et al., "When Speed Kills Stability" (2025), whose rules and bound verl's rollout correction follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mega.config import AlgoConfig
from treepo_mega.tree.credit import Lesson
from treepo_mega.tree.pack import Pack
from treepo_mega.tree.segments import Bools, Floats, Segments

LOG_BOUND = 20.0
"""Largest |log ratio| of a trajectory that is told from larger ones, nats: exp would overflow."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What each trajectory counts [L], in the caller's order of leaves."""

    factors: Floats | None
    """Weights of the masses; None: 1."""
    kept: Bools | None
    """Not rejected; None: all."""
    ratios: Floats | None
    """The ratios before they were bounded to `factors`."""


def gather_evidence(packs: Sequence[Pack], segments: int, algo: AlgoConfig) -> Floats:
    """[2, S] of the rows of `packs`: the sum of log ratios trainer / engine by segment, and the tokens with a veto.

    Packs without old logprobs (other pipeline stages) have nothing to say.
    """
    evidence = np.zeros((2, segments))
    veto = algo.rollout_token_veto_threshold
    for pack in packs:
        if pack.old_logprobs is None:
            continue
        log_ratio = pack.old_logprobs.astype(np.float64) - pack.rollout_logprobs
        evidence[0] += np.bincount(pack.segment, log_ratio, segments)
        if veto is not None:
            evidence[1] += np.bincount(pack.segment, log_ratio < np.log(veto), segments)
    return evidence


def judge(step: Segments | Lesson, evidence: Floats, algo: AlgoConfig) -> Verdict:
    """Weigh and reject trajectories by the `evidence` [2, S] of all rows of the step."""
    log_product = step.leaf_sums(evidence[0])
    factors: Floats | None = None
    ratios: Floats | None = None
    kept: Bools | None = None
    if algo.weighs_leaves:
        ratios = _ratios(log_product, step, algo.rollout_is)
        factors = ratios.clip(algo.tis_clip_low, algo.tis_clip)
    if algo.rejects_leaves:
        kept = step.leaf_sums(evidence[1]) == 0
    if algo.rollout_rs is not None:
        high = algo.rollout_rs_threshold
        low = algo.rollout_rs_threshold_lower or 1 / high
        judged = _ratios(log_product, step, algo.rollout_rs)
        inside = (low <= judged) & (judged <= high)
        kept = inside if kept is None else kept & inside
    return Verdict(factors, kept, ratios)


def _ratios(log_product: Floats, step: Segments | Lesson, level: str | None) -> Floats:
    """[L] the ratio of each trajectory at `level`; 1 for one without tokens."""
    size = np.maximum(step.flat_lengths(), 1) if level == "geometric" else 1
    return np.exp((log_product / size).clip(-LOG_BOUND, LOG_BOUND))
