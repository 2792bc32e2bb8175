"""LM head to log-probabilities, vocabulary-parallel, without ever holding [N, V/tp] logits.

From hidden states of the predicting tokens [N, K] and this rank's shard of the output weight [V/tp, K] to
the log-probability of each target and the entropy of each distribution [N]. A tile of rows is alive at a time
(`Shard.tile_rows`). Two ways to the gradient:

    logprob_entropy   any function of (logp, entropy): the backward pass recomputes the logits, a row tile at a
                      time. Four matrix products of the size of the logits. Without gradients: one.
    fused.row_loss    a loss that is a sum over rows, its gradient taken tile by tile while the logits are still there.
                      Three products. The policy update uses it.

Per row three sums cross the vocabulary shards (sum exp, sum exp * z, target logit), in two all-reduces over the
tensor-parallel group: a MAX, then a SUM of three numbers a row. Columns at or beyond the true vocabulary size
(padding) are excluded from the distribution.

With z the logits after temperature, p their softmax, H the entropy:
    d logp_target / dz = onehot - p          dH / dz = -p * (log p + H)
The hidden gradient of a rank is only its shard's part: the caller sums it over tensor-parallel ranks
(`copy_to_tensor_model_parallel_region` or the sequence-parallel gather do). The weight gradient is added straight
to `weight.main_grad` where Megatron has given the parameter one: no [V/tp, K] temporary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from treepo_mega.loss.operands import COLUMNS, Operands, column_slices
from treepo_mega.loss.shard import Shard, arrived, joined, main_grad


def row_parts(rows: int, size: int) -> Iterator[slice]:
    """[0, rows) in slices of `size`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class Tiles:
    """Logits of one call, a tile of rows at a time, with the sums that log-softmax and entropy need."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> None:
        self.shard = shard
        self.ops = Operands(hidden, weight, shard.valid, shard.numerics, shard.cache)
        self.mine, self.local = shard.owned(target)
        self.rows = shard.tile_rows(self.ops.dtype.itemsize)
        self._buffer: Tensor | None = None
        self._scratch: Tensor | None = None

    def parts(self) -> Iterator[slice]:
        """The row slices of this call."""
        return row_parts(self.ops.hidden.shape[0], self.rows)

    def logits(self, part: slice) -> Tensor:
        """z [n, valid] after temperature, in a buffer that the next call overwrites."""
        hidden = self.ops.hidden
        if self._buffer is None:
            rows = min(self.rows, hidden.shape[0])
            self._buffer = torch.empty(rows, self.shard.valid, dtype=self.ops.dtype, device=hidden.device)
        # One buffer for all row parts: a slice of logits is the largest tensor of a step.
        tile = self._buffer[: part.stop - part.start]
        self.ops.logits(part, tile, self.shard.temperature)
        exact = self.ops.exact_targets(part, self.local[part], self.shard.temperature)
        # Before the sums are taken: the softmax must hold the same target logit in numerator and denominator.
        # Where another shard owns the target, the clamped column gets its own logit back.
        if exact is not None and self.shard.valid:
            column = self.local[part, None]
            tile.scatter_(1, column, torch.where(self.mine[part, None], exact[:, None], tile.gather(1, column)))
        return tile

    def sums_(self, part: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        """(peak [n], sums [3, n]) of this shard; z [n, valid] becomes exp(z - peak).

        sums: of exp(z - peak), of exp(z - peak) * (z - peak), and the target's logit (0 where another rank owns it).
        """
        count = z.shape[0]
        sums = torch.zeros(3, count, dtype=z.dtype, device=z.device)
        if not z.shape[1]:
            return torch.full((count,), float("-inf"), dtype=z.dtype, device=z.device), sums
        # exp(z - peak) is at most 1: no overflow, whatever the logits.
        peak = z.amax(1)
        # Before the loop, which overwrites z.
        sums[2] = torch.where(self.mine[part], z.gather(1, self.local[part, None])[:, 0], sums[2])
        if self._scratch is None:
            self._scratch = z.new_empty(min(self.rows, self.ops.hidden.shape[0]), min(COLUMNS, z.shape[1]))
        for columns in column_slices(z.shape[1]):
            shifted = z[:, columns].sub_(peak[:, None])
            # One buffer for all slices: fresh ones of a few MiB fragment the heap, and the peak grows by half.
            kept = self._scratch[:count, : shifted.shape[1]].copy_(shifted)
            sums[0] += shifted.exp_().sum(1)
            sums[1] += kept.mul_(shifted).sum(1)
        return peak, sums

    def to_gradient_(self, part: slice, p: Tensor, g_logp: Tensor, g_entropy: Tensor | None, entropy: Tensor) -> Tensor:
        """Turn p [n, valid] (softmax) in place into d loss / d logits before temperature; all others are [n]."""
        scaled_logp = g_logp / self.shard.temperature
        if g_entropy is None:
            p.mul_(-scaled_logp[:, None])
        else:
            scaled_entropy = g_entropy / self.shard.temperature
            for columns in column_slices(p.shape[1]):
                # Where p is 0 its logarithm is -inf, and 0 * -inf would be NaN; the term's limit is 0.
                slope = p[:, columns].log()
                slope.masked_fill_(p[:, columns] == 0, 0).add_(entropy[:, None]).mul_(scaled_entropy[:, None]).add_(
                    scaled_logp[:, None]
                )
                p[:, columns].mul_(slope.neg_())
        if p.shape[1]:
            own = torch.where(self.mine[part], scaled_logp, torch.zeros_like(scaled_logp))
            p.scatter_add_(1, self.local[part, None], own[:, None])
        return p


class _LogProbEntropy(torch.autograd.Function):
    """See the module docstring; a function of (hidden, weight) with two outputs."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, buffer: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(logp [N], entropy [N]); two all-reduces over the group."""
        tiles = Tiles(hidden, weight, target, shard)
        rows = hidden.shape[0]
        peak = torch.empty(rows, dtype=tiles.ops.dtype, device=hidden.device)
        sums = torch.empty(3, rows, dtype=tiles.ops.dtype, device=hidden.device)
        for part in tiles.parts():
            peak[part], sums[:, part] = tiles.sums_(part, tiles.logits(part))
        return joined(ctx, (hidden, weight, target), shard, buffer, peak, sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [N, K] (this shard's part) and weight [V/tp, K], logits recomputed; no collective."""
        hidden, weight, target, lse, entropy, g_logp, g_entropy = arrived(ctx, grads)
        tiles = Tiles(hidden, weight, target, ctx.shard)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=tiles.ops.dtype) if ctx.buffer is None else ctx.buffer
        for part in tiles.parts():
            tile = tiles.logits(part)
            for columns in column_slices(tile.shape[1]):
                tile[:, columns].sub_(lse[part, None]).exp_()
            slope = None if g_entropy is None else g_entropy[part]
            dz = tiles.to_gradient_(part, tile, g_logp[part], slope, entropy[part])
            tiles.ops.add_gradients(part, dz, d_hidden, d_weight)
        return d_hidden, d_weight.to(weight.dtype) if ctx.buffer is None else None, None, None, None


def logprob_entropy(hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` [N] and entropy [N], in nats, fp32 (fp64 for fp64 input).

    hidden [N, K]; weight [V/tp, K], the rows of the output matrix that `shard` says. Collectives: two
    all-reduces of [N] and [3, N] over the shard's group in forward, none in backward.
    """
    function: type[torch.autograd.Function] = _LogProbEntropy
    if shard.kernels and hidden.shape[0]:
        from treepo_mega.loss.triton.head import TritonLogProbEntropy

        function = TritonLogProbEntropy
    return function.apply(hidden, weight, target, shard, main_grad(weight, shard))
