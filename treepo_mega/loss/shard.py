"""A rank's part of the vocabulary, and how the parts of all ranks join.

The torch tiles (`logprobs.py`) and the Triton kernels (`triton/head.py`) both make, per row, a peak and three sums over
their own columns. `joined` turns these into log-probability and entropy over the whole vocabulary, and keeps what the
backward pass needs; `arrived` takes it up again. So neither implementation imports the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mega.errors import TreepoError
from treepo_mega.loss.operands import Numerics, WeightCache

TILE_BYTES = 48 * 2**20
"""Logits alive at a time. Products of few rows are slow, hence at least MIN_TILE_ROWS whatever that takes."""
MIN_TILE_ROWS = 128


class TargetError(TreepoError):
    """A token to score is not in the model's vocabulary; the message names its row."""


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
        # Not from `valid`, of which the last rank has less: all ranks must take tiles of one size.
        columns = -(-self.vocab_size // dist.get_world_size(self.group)) if self.shared else self.vocab_size
        return min(self.chunk, max(TILE_BYTES // (itemsize * columns), MIN_TILE_ROWS))

    def owned(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(is the target one of this shard's columns, and which; 0 or the last where it is not), both [N].

        Raises TargetError on a CPU, and fails on a GPU, for a target that no shard has: its logit would be taken for 0.
        """
        known = (target >= 0) & (target < self.vocab_size)
        # On a GPU the check must not wait for the device.
        if target.is_cuda:
            torch._assert_async(known.all(), "a target is no token of the vocabulary")
        elif not bool(known.all()):
            row = int((~known).nonzero()[0, 0])
            raise TargetError(
                f"row {row}: the target {int(target[row])} is no token of {self.vocab_size}: the text was tokenized "
                "for another model"
            )
        # Clamped, so that gathers stay in bounds; `mine` says which of the values count.
        local = target - self.first
        mine = (local >= 0) & (local < self.valid)
        return mine, local.clamp(0, max(self.valid - 1, 0))

    @classmethod
    def of(cls, weight: Tensor, vocab_start: int, vocab_size: int, **how: Any) -> Shard:
        """The shard that `weight` [V/tp, K] is when its first row is token `vocab_start` of `vocab_size`."""
        return cls(vocab_start, min(max(vocab_size - vocab_start, 0), weight.shape[0]), vocab_size, **how)


def over_shards(shard: Shard, peak: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), each like `peak`, from `Tiles.sums_`; two all-reduces over the group. `sums` is used up."""
    top = peak
    if shard.shared:
        # A copy: the all-reduce writes in place, and this shard's own peak is needed after it.
        top = peak.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
        # A shard of nothing but padding has no part in the distribution.
        has = peak > float("-inf")
        lower = torch.where(has, peak - top, torch.zeros_like(peak))
        factor = torch.where(has, lower.exp(), torch.zeros_like(peak))
        # In this order: moving the second sum to the common peak needs the first one unscaled.
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
    ctx.shard = shard
    ctx.buffer = buffer
    # Without this an entropy that the loss never read would arrive as a gradient of zeros.
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
    """The beginning of a backward pass. Zeros for a logp without a gradient; None for such an entropy."""
    g_logp, g_entropy = (grad if grad is None else grad.contiguous() for grad in grads)
    hidden, weight, target, lse, entropy = ctx.saved_tensors
    return Arrived(hidden, weight, target, lse, entropy, torch.zeros_like(lse) if g_logp is None else g_logp, g_entropy)
