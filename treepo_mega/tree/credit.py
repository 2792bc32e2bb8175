"""Advantages and loss weights of trajectories, folded into one set of numbers per segment. Pure NumPy.

    w = leaf_weights("seq-mean-token-mean", lengths)      # what a token of each trajectory counts in the loss
    c = fold(segments, advantages, w)                     # A_pos, A_neg, n, count per segment
    c = fold_nodes(segments, node_advantages, w)          # the same for advantages per node (`segment`)

All trajectories through a token share its probability ratio, so their clipped terms need only two sums, of the
positive and of the negative advantages (`loss/policy.py`). `loss_agg_mode` gives trajectory i the weight w_i:

    token-mean             w_i = 1            sum over all (trajectory, token) pairs / P, their number
    seq-mean-token-mean    w_i = P / (N l_i)  mean over the N trajectories of the mean over their l_i tokens
    seq-mean-token-sum     w_i = P / N        mean over trajectories of the sum over their tokens
    seq-mean-token-sum-norm  w_i = P / (N L)  the same divided by the longest response allowed, L (Dr.GRPO)

Where leaves do not count alike (`tree/descent.py`), N is the sum of what they count and w_i holds leaf i's count as a
factor. token-mean then divides by the pairs so counted: w_i = c_i P / sum c_j l_j.

With these the loss is in every mode the weighted sum over rows divided by P, which is what Megatron's per-token loss
divides by, and masses and multiplicity become A_pos = sum w_i max(A_i, 0), A_neg = sum w_i min(A_i, 0),
n = sum w_i, exactly: a sum over trajectories stays a sum. `count` is the plain number of trajectories, for
statistics. P and N are of the optimizer step over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from treepo_mega.tree.segments import Bools, Floats, Segments
from treepo_mega.tree.sums import Ints, path_sums

if TYPE_CHECKING:
    from treepo_mega.tree.merge import Merged

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
QUARTERS = 4


@dataclass(slots=True)
class Credit:
    """Per segment [S]: A_pos >= 0, A_neg <= 0, loss weight n, and number of trajectories `count`."""

    A_pos: Floats
    A_neg: Floats
    n: Floats
    count: Ints


def leaf_weights(
    mode: str, lengths: Ints, *, counts: Floats | None = None, max_response_len: int | None = None
) -> Floats:
    """[L] weight of each trajectory's tokens.

    Args:
        mode: An `Aggregation`.
        lengths: [L] trained tokens of each trajectory.
        counts: [L] what each trajectory counts, in any unit. None: all alike.
        max_response_len: L of seq-mean-token-sum-norm, tokens.

    Raises ValueError for an unknown mode, and for seq-mean-token-sum-norm without `max_response_len`.
    """
    if mode not in get_args(Aggregation):
        raise ValueError(f"loss_agg_mode {mode!r}: expected one of {', '.join(get_args(Aggregation))}")
    pairs = float(lengths.sum())
    counted = np.ones(len(lengths)) if counts is None else counts
    if mode == "token-mean":
        # Without counts exactly 1: the sum of ones times lengths is the number of pairs.
        return counted if counts is None else counted * (pairs / max(float((counted * lengths).sum()), 1e-30))
    trajectories = max(float(counted[lengths > 0].sum()), 1.0 if counts is None else 1e-30)
    per_trajectory = counted * (pairs / trajectories)
    if mode == "seq-mean-token-sum":
        return per_trajectory
    if mode == "seq-mean-token-sum-norm":
        if max_response_len is None:
            raise ValueError("loss_agg_mode seq-mean-token-sum-norm needs max_response_len")
        return per_trajectory / max_response_len
    if counts is None:
        return pairs / (trajectories * np.maximum(lengths, 1.0))
    return per_trajectory / np.maximum(lengths, 1.0)


def fold(s: Segments, advantages: Floats, weights: Floats, factors: Floats | None = None) -> Credit:
    """Advantages [L] and weights [L], both in the caller's order of leaves, summed over the leaves below.

    `factors` [L] weigh a trajectory in the masses alone, not in `n`: importance weights, which KL and entropy have none
    of. None: 1.
    """
    mass = weights if factors is None else weights * factors
    return Credit(
        s.sum_below(mass * np.maximum(advantages, 0)),
        s.sum_below(mass * np.minimum(advantages, 0)),
        s.sum_below(weights),
        s.count_below(),
    )


def fold_nodes(s: Segments, advantages: Floats, weights: Floats, factors: Floats | None = None) -> Credit:
    """Advantages per node (numbered over all trees in the caller's order) and weights [L] of trajectories.

    `factors` as in `fold`.
    """
    advantage = advantages[s.node]
    weight = s.sum_below(weights)
    mass = weight if factors is None else s.sum_below(weights * factors)
    return Credit(mass * np.maximum(advantage, 0), mass * np.minimum(advantage, 0), weight, s.count_below())


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an optimizer step teaches: it can be folded anew when the weights of its leaves change."""

    segments: Segments
    advantages: Floats
    """[L], or per node, both in the caller's order."""
    per_node: bool
    loss_agg_mode: str
    counts: Floats | None = None
    """[L] as in `leaf_weights`."""
    max_response_len: int | None = None
    merged: Merged | None = None
    """What rows are laid out by, where equal tokens were merged after credit was given; None: `segments`."""

    @property
    def laid_out(self) -> Segments:
        """The segments that rows of packs refer to. Their leaves are those of `segments`, in the caller's order."""
        return self.segments if self.merged is None else self.merged.segments

    def row_credit(self, factors: Floats | None = None, kept: Bools | None = None) -> Credit:
        """`credit` of the segments of `laid_out`."""
        credit = self.credit(factors, kept)
        return credit if self.merged is None else self.merged.credit(credit)

    def credit(self, factors: Floats | None = None, kept: Bools | None = None) -> Credit:
        """Masses, weights and counts, with `factors` [L] on the masses and without the leaves that are not `kept` [L].

        A leaf that is not kept is as if it had never been sampled, except that its reward stays in the baselines: it
        leaves the masses, `n`, `count`, P and N.
        """
        lengths = self.segments.flat_lengths()
        counts = self.counts
        if kept is not None:
            # A trajectory without tokens counts in neither P nor N.
            lengths = lengths * kept
            counts = counts if counts is None else counts * kept
        weights = leaf_weights(self.loss_agg_mode, lengths, counts=counts, max_response_len=self.max_response_len)
        if kept is not None:
            weights = weights * kept
        folded = (fold_nodes if self.per_node else fold)(self.segments, self.advantages, weights, factors)
        if kept is not None:
            folded.count = self.segments.sum_below(kept.astype(np.int64))
        return folded

    def leaf_sums(self, value: npt.NDArray) -> npt.NDArray:
        """[L] sum over each trajectory of `value`, one a segment of `laid_out`; in the caller's order of leaves."""
        return self.segments.leaf_sums(value) if self.merged is None else self.merged.leaf_sums(value)

    def flat_lengths(self) -> Ints:
        """[L] trained tokens of each trajectory, in the caller's order of leaves."""
        return self.segments.flat_lengths()


def credit_by_depth(s: Segments, c: Credit) -> list[float]:
    """Share of the credit that falls into each quarter of the path, first to last; zeros when there is none.

    The credit of a token is |A_pos + A_neg| / n, the mean advantage of the trajectories through it: what pushes
    it at ratio 1. Summed over (trajectory, token) pairs, each placed by its depth relative to its own trajectory.
    Linear in (trajectory, segment) pairs.
    """
    size = np.where(s.trained, s.length, 0)
    before, segment = s.course
    end = path_sums(before, size)
    total = end[segment]
    net = np.abs(c.A_pos + c.A_neg) / np.maximum(c.n, 1e-30)
    share = np.zeros(QUARTERS)
    leaf_of_segment = np.arange(len(segment))
    while len(segment):
        unit = np.maximum(total[leaf_of_segment], 1) / QUARTERS
        begin = end[segment] - size[segment]
        for quarter in range(QUARTERS):
            inside = np.minimum(end[segment], (quarter + 1) * unit) - np.maximum(begin, quarter * unit)
            share[quarter] += (np.maximum(inside, 0) * net[segment]).sum()
        segment = before[segment]
        goes_on = segment >= 0
        leaf_of_segment = leaf_of_segment[goes_on]
        segment = segment[goes_on]
    return (share / share.sum()).tolist() if share.sum() > 0 else [0.0] * QUARTERS
