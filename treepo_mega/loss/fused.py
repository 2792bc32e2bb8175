"""Loss and gradient in one pass over the logits, for a loss that is a sum over rows.

`logprob_entropy` recomputes the logits in backward, because the gradient of the loss arrives only then. If the loss is
a sum over rows, that gradient has a closed form and is known in forward. So each tile of rows goes all the way: logits
-> logp and entropy -> loss and slope (`policy.py`) -> d loss / d logits, over the tile itself -> dHidden and dWeight.
That is three matrix products in place of four. Only dHidden [N, K] is kept for the backward pass.

dWeight is therefore added to its buffer in the *forward* pass. Without a `main_grad` the weight gradient is kept
([V/tp, K]) and scaled in the backward pass as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from treepo_mega.loss.logprobs import Tiles, logprob_entropy
from treepo_mega.loss.shard import Shard, main_grad, over_shards
from treepo_mega.loss.stats import Stats

RowLoss = Callable[[Tensor, Tensor, slice], tuple[Tensor, Stats]]
"""(logp [n], entropy [n], rows) -> (loss summed over these rows, statistics of them). Both inputs want gradients."""


class _RowLoss(torch.autograd.Function):
    """See the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        shard: Shard,
        loss: RowLoss,
        buffer: Tensor | None,
        loss_scale: float,
        reports: list[Stats],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [], logp [N], entropy [N]); two all-reduces over the group for each tile of rows."""
        tiles = Tiles(hidden, weight, target, shard)
        dtype = tiles.ops.dtype
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=dtype) if buffer is None else buffer
        logp, entropy = torch.empty(2, hidden.shape[0], dtype=dtype, device=hidden.device)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for part in tiles.parts():
            tile = tiles.logits(part)
            peak, partial = tiles.sums_(part, tile)
            logp[part], entropy[part], lse = over_shards(shard, peak, partial)
            value, g_logp, g_entropy = _slopes(loss, logp[part], entropy[part], part, reports)
            total += value
            # Megatron's buffer gets its gradient now. That is right under two conditions, which hold for Megatron's
            # schedules: the gradient that will arrive here is known (`loss_scale`; backward checks it), and every
            # forward pass with gradients is followed by its backward pass.
            if buffer is not None and loss_scale != 1:
                g_logp = g_logp * loss_scale
                g_entropy = None if g_entropy is None else g_entropy * loss_scale
            # The tile holds exp(z - peak); exp(peak - lse) completes the softmax.
            if tile.shape[1]:
                tile.mul_((peak - lse).exp()[:, None])
            dz = tiles.to_gradient_(part, tile, g_logp, g_entropy, entropy[part])
            tiles.ops.add_gradients(part, dz, d_hidden, d_weight)
        # Without rows no tile ran, and the statistics must still have their names.
        if not hidden.shape[0]:
            value, _, _ = _slopes(loss, logp, entropy, slice(0, 0), reports)
            total += value
        ctx.save_for_backward(d_hidden, *([d_weight] if buffer is None else []))
        ctx.loss_scale = loss_scale
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass made. With a main_grad the incoming gradient must be `loss_scale`."""
        d_hidden, *kept = ctx.saved_tensors
        incoming = grads[0]
        none = (None,) * 6
        if kept:
            return d_hidden * incoming, (kept[0] * incoming).to(ctx.dtype), *none
        torch._assert_async(
            incoming == ctx.loss_scale,
            "the gradient that arrived at the fused loss is not the loss_scale it was told: the weight's main_grad "
            "already holds a gradient of another scale",
        )
        return d_hidden, None, *none


def _slopes(
    loss: RowLoss, logp: Tensor, entropy: Tensor, part: slice, reports: list[Stats]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, d loss / d logp, d loss / d entropy or None) of a tile of rows; appends its statistics to `reports`."""
    # torch runs the forward of an autograd function without gradients: they are switched on for the loss alone.
    with torch.enable_grad():
        leaves = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        value, stats = loss(*leaves, part)
        g_logp, g_entropy = torch.autograd.grad(value, leaves, allow_unused=True)
    # Detached: otherwise each tile's graph would live until the statistics are summed up.
    reports.append(stats.detach())
    return value.detach(), torch.zeros_like(logp) if g_logp is None else g_logp, g_entropy


def row_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, loss: RowLoss, *, loss_scale: float = 1.0
) -> tuple[Tensor, Stats, Tensor, Tensor]:
    """(loss [], statistics, logp [N], entropy [N]) of hidden [N, K] under weight [V/tp, K].

    Only the loss carries gradients: to `hidden` (this shard's part) and to `weight`, whose gradient goes straight to
    `weight.main_grad` when there is one, already in this call. Collectives: two all-reduces over the group for each
    tile of rows. With the fused kernels there are no logits to take the gradient from: they recompute them, and the
    two all-reduces are of whole vectors.
    """
    if shard.backend == "triton":
        logp, entropy = logprob_entropy(hidden, weight, target, shard)
        total, stats = loss(logp, entropy, slice(0, hidden.shape[0]))
        return total, stats, logp.detach(), entropy.detach()
    reports: list[Stats] = []
    total, logp, entropy = _RowLoss.apply(
        hidden, weight, target, shard, loss, main_grad(weight, shard), loss_scale, reports
    )
    return total, functools.reduce(Stats.__add__, reports, Stats()), logp, entropy
