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

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mega.loss.operands import COLUMNS, Numerics, Operands, WeightCache, column_slices

TILE_BYTES = 48 * 2**20
"""Logits alive at a time. Products of few rows are slow, hence at least MIN_TILE_ROWS whatever that takes."""
MIN_TILE_ROWS = 128


@dataclass(slots=True)
class Shard:
    """This rank's part of the vocabulary, and how its logits are taken."""

    first: int
    """The first column's token id."""
    valid: int
    """Columns that are real tokens; 0 for a shard of nothing but padding."""
    vocab_size: int
    """True vocabulary of all shards together."""
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None
    chunk: int = 1024
    numerics: Numerics = field(default_factory=Numerics)
    cache: WeightCache = field(default_factory=WeightCache)
    backend: Literal["torch", "triton"] = "torch"
    use_main_grad: bool = True
    """Add the weight's gradient to `weight.main_grad` where there is one; off, it is returned as usual."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the head's temperature is {self.temperature}; expected a positive number")

    @property
    def shared(self) -> bool:
        """Is the vocabulary split over several ranks?"""
        return self.group is not None and dist.get_world_size(self.group) > 1

    @property
    def kernels(self) -> bool:
        """Do fused kernels run this shard? One of nothing but padding has nothing for them to do."""
        return self.backend == "triton" and self.valid > 0

    def tile_rows(self, itemsize: int) -> int:
        """Rows of logits alive at a time: at most `chunk`, and TILE_BYTES, but MIN_TILE_ROWS of them.

        The same on every rank of the group, however the vocabulary is split: they meet after every tile.
        """
        columns = -(-self.vocab_size // dist.get_world_size(self.group)) if self.shared else self.vocab_size
        return min(self.chunk, max(TILE_BYTES // (itemsize * columns), MIN_TILE_ROWS))

    def owned(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(is the target one of this shard's columns, and which; 0 or the last where it is not), both [N].

        Raises ValueError on a CPU, and fails on a GPU, for a target that no shard has: its logit would be taken for 0.
        """
        known = (target >= 0) & (target < self.vocab_size)
        if target.is_cuda:
            torch._assert_async(known.all(), "a target is no token of the vocabulary")
        elif not bool(known.all()):
            row = int((~known).nonzero()[0, 0])
            raise ValueError(f"row {row}: the target {int(target[row])} is no token of {self.vocab_size}")
        local = target - self.first
        mine = (local >= 0) & (local < self.valid)
        return mine, local.clamp(0, max(self.valid - 1, 0))

    @classmethod
    def of(cls, weight: Tensor, vocab_start: int, vocab_size: int, **how: Any) -> Shard:
        """The shard that `weight` [V/tp, K] is when its first row is token `vocab_start` of `vocab_size`."""
        return cls(vocab_start, min(max(vocab_size - vocab_start, 0), weight.shape[0]), vocab_size, **how)


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
        h = self.ops.hidden
        if self._buffer is None:
            rows = min(self.rows, h.shape[0])
            self._buffer = torch.empty(rows, self.shard.valid, dtype=self.ops.dtype, device=h.device)
        z = self._buffer[: part.stop - part.start]
        self.ops.logits(part, z, self.shard.temperature)
        exact = self.ops.exact_targets(part, self.local[part], self.shard.temperature)
        if exact is not None and self.shard.valid:
            column = self.local[part, None]
            z.scatter_(1, column, torch.where(self.mine[part, None], exact[:, None], z.gather(1, column)))
        return z

    def sums_(self, part: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        """(peak [n], sums [3, n]) of this shard; z [n, valid] becomes exp(z - peak).

        sums: of exp(z - peak), of exp(z - peak) * (z - peak), and the target's logit (0 where another rank owns it).
        """
        n = z.shape[0]
        sums = torch.zeros(3, n, dtype=z.dtype, device=z.device)
        if not z.shape[1]:
            return torch.full((n,), float("-inf"), dtype=z.dtype, device=z.device), sums
        peak = z.amax(1)
        sums[2] = torch.where(self.mine[part], z.gather(1, self.local[part, None])[:, 0], sums[2])
        if self._scratch is None:
            self._scratch = z.new_empty(min(self.rows, self.ops.hidden.shape[0]), min(COLUMNS, z.shape[1]))
        for c in column_slices(z.shape[1]):
            shifted = z[:, c].sub_(peak[:, None])
            # One buffer for all slices: fresh ones of a few MiB fragment the heap, and the peak grows by half.
            kept = self._scratch[:n, : shifted.shape[1]].copy_(shifted)
            sums[0] += shifted.exp_().sum(1)
            sums[1] += kept.mul_(shifted).sum(1)
        return peak, sums

    def to_gradient_(self, part: slice, p: Tensor, g_logp: Tensor, g_entropy: Tensor | None, entropy: Tensor) -> Tensor:
        """Turn p [n, valid] (softmax) in place into d loss / d logits before temperature; all others are [n]."""
        g = g_logp / self.shard.temperature
        if g_entropy is None:
            p.mul_(-g[:, None])
        else:
            h = g_entropy / self.shard.temperature
            for c in column_slices(p.shape[1]):
                slope = p[:, c].log()
                slope.masked_fill_(p[:, c] == 0, 0).add_(entropy[:, None]).mul_(h[:, None]).add_(g[:, None])
                p[:, c].mul_(slope.neg_())
        if p.shape[1]:
            own = torch.where(self.mine[part], g, torch.zeros_like(g))
            p.scatter_add_(1, self.local[part, None], own[:, None])
        return p


def over_shards(shard: Shard, peak: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), each like `peak`, from `Tiles.sums_`; two all-reduces over the group. `sums` is used up."""
    top = peak
    if shard.shared:
        top = peak.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
        has = peak > float("-inf")  # a shard of nothing but padding has no part in the distribution
        lower = torch.where(has, peak - top, torch.zeros_like(peak))
        factor = torch.where(has, lower.exp(), torch.zeros_like(peak))
        sums[1] = factor * (sums[1] + lower * sums[0])
        sums[0] *= factor
        dist.all_reduce(sums, group=shard.group)
    log_sum = sums[0].log()
    return sums[2] - top - log_sum, log_sum - sums[1] / sums[0], top + log_sum


def main_grad(weight: Tensor, shard: Shard) -> Tensor | None:
    """Megatron's gradient buffer [V/tp, K] of this parameter, or None."""
    return getattr(weight, "main_grad", None) if shard.use_main_grad else None


def joined(
    ctx: Any, operands: tuple[Tensor, Tensor, Tensor], shard: Shard, buffer: Tensor | None, peak: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """The end of a forward pass, whatever made the sums: (logp [N], entropy [N]); two all-reduces over the group.

    `operands` (hidden, weight, target) and the rest that `arrived` gives back are kept in `ctx`.
    """
    logp, entropy, lse = over_shards(shard, peak, sums)
    ctx.save_for_backward(*operands, lse, entropy)
    ctx.shard, ctx.buffer = shard, buffer
    ctx.set_materialize_grads(False)
    return logp, entropy


class Arrived(NamedTuple):
    """What a backward pass begins with: what was kept, and the gradients of both outputs [N]."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    lse: Tensor
    entropy: Tensor
    g_logp: Tensor
    g_entropy: Tensor | None


def arrived(ctx: Any, grads: tuple[Tensor | None, ...]) -> Arrived:
    """The beginning of a backward pass. Zeros for a logp nobody asked about; None for such an entropy."""
    g_logp, g_entropy = (g if g is None else g.contiguous() for g in grads)
    kept = ctx.saved_tensors
    return Arrived(*kept, torch.zeros_like(kept[3]) if g_logp is None else g_logp, g_entropy)


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
            p = tiles.logits(part)
            for c in column_slices(p.shape[1]):
                p[:, c].sub_(lse[part, None]).exp_()
            slope = None if g_entropy is None else g_entropy[part]
            dz = tiles.to_gradient_(part, p, g_logp[part], slope, entropy[part])
            tiles.ops.add_gradients(part, dz, d_hidden, d_weight)
        return d_hidden, d_weight.to(weight.dtype) if ctx.buffer is None else None, None, None, None


def logprob_entropy(hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` [N] and entropy [N], in nats, fp32 (fp64 for fp64 input).

    hidden [N, K]; weight [V/tp, K], the rows of the output matrix that `shard` says. Collectives: two
    all-reduces of [N] and [3, N] over the shard's group in forward, none in backward.
    """
    function = _LogProbEntropy
    if shard.kernels and hidden.shape[0]:
        from treepo_mega.loss.triton.head import TritonLogProbEntropy

        function = TritonLogProbEntropy
    return function.apply(hidden, weight, target, shard, main_grad(weight, shard))
