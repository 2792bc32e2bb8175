"""`loss/logprobs.py`'s logprob_entropy on the fused kernels: the same numbers, and no logits in memory at all.

Forward: quantise hidden states (the weight's quantised copy is kept per optimizer step), one kernel over splits of the
vocabulary, one that joins the splits, then the same two all-reduces. Backward: a slice of the vocabulary at a time,
d loss / d logits [N, SLICE] from recomputed logits, and two plain products for the hidden and the weight gradient.
The loss in between is T-sized: `launch.policy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treepo_mega.loss import te
from treepo_mega.loss.quantize import split
from treepo_mega.loss.shard import Shard, arrived, joined
from treepo_mega.loss.triton import launch
from treepo_mega.loss.triton.launch import Slopes

SLICE = 32 * launch.BN
"""Vocabulary columns whose gradients [N, SLICE] are alive at a time."""


class _Call:
    """The operands of one call, prepared alike for forward and backward."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> None:
        self.shard = shard
        self.hidden = hidden.detach()
        self.weight = weight.detach()
        mine, local = shard.owned(target)
        self.column = torch.where(mine, local, torch.full_like(local, -1)).int()
        exact = self._prepare_fp8(local) if shard.numerics.precision == "fp8" else self._prepare_plain(local)
        # The kernel adds the target's logit itself, apart from the sums: it may be more exact than the rest.
        self.given = exact / shard.temperature

    def _prepare_fp8(self, local: Tensor) -> Tensor:
        """Set the quantised operands; the targets' logits [N]."""
        numerics = self.shard.numerics
        valid = self.shard.valid
        weight8 = self.shard.cache.quantised(self.weight, valid, numerics, self.hidden, by=launch.quantize_rows)
        how = {"power_of_2_scales": numerics.power_of_2_scales}
        hidden8 = split(self.hidden, weight8.channels, numerics.recipe, launch.quantize_rows, **how)
        self.a = launch.scaled(hidden8, len(local))
        self.b = launch.scaled(weight8, valid)
        if numerics.exact_target:
            return self._dot(local, torch.bfloat16)
        return (hidden8.values() * weight8.values()[local]).sum(1)

    def _prepare_plain(self, local: Tensor) -> Tensor:
        """Set fp32 or bf16 operands; the targets' logits [N]."""
        dtype = torch.float32 if self.shard.numerics.precision == "fp32" else torch.bfloat16
        self.a = launch.plain(self.hidden.to(dtype))
        self.b = launch.plain(self.shard.cache.rounded(self.weight, dtype)[: self.shard.valid])
        return self._dot(local, dtype)

    def _dot(self, column: Tensor, dtype: torch.dtype) -> Tensor:
        """The targets' logits [N] from operands rounded to `dtype`, summed in fp32."""
        own = self.weight.index_select(0, column)
        return (self.hidden.to(dtype).float() * own.to(dtype).float()).sum(1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of fp32 or bf16 operands, summed and returned in fp32."""
    # cuBLAS sums bf16 products in fp32; without `out_dtype` it would round the result to bf16 once more.
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class TritonLogProbEntropy(torch.autograd.Function):
    """See the module docstring; arguments as in `loss/logprobs.py`. Never called for a shard of nothing but padding."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, buffer: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(logp [N], entropy [N]), fp32; two all-reduces over the group."""
        call = _Call(hidden, weight, target, shard)
        peak, sums = launch.forward(call.a, call.b, call.column, call.given, shard.temperature)
        return joined(ctx, (hidden, weight, target), shard, buffer, peak, sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [N, K] (this shard's part) and weight [V/tp, K]; no collective."""
        hidden, weight, target, *of_rows = arrived(ctx, grads)
        shard: Shard = ctx.shard
        slopes = Slopes(*of_rows)
        call = _Call(hidden, weight, target, shard)
        dtype = torch.float32 if shard.numerics.precision == "fp32" else torch.bfloat16
        rounded_hidden = hidden.detach().to(dtype)
        rounded_weight = shard.cache.rounded(weight, dtype)
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)
        d_weight = torch.zeros(weight.shape, device=weight.device) if ctx.buffer is None else ctx.buffer
        dz = torch.empty(hidden.shape[0], min(SLICE, shard.valid), dtype=dtype, device=hidden.device)
        # Columns beyond `valid` are padding of the vocabulary: they get no gradient.
        for first in range(0, shard.valid, SLICE):
            end = min(first + SLICE, shard.valid)
            part = dz[:, : end - first]
            launch.dlogits(call.a, call.b, call.column, call.given, shard.temperature, slopes, first, part)
            if shard.numerics.precision == "fp8" and shard.numerics.grads == "fp8":
                to_hidden, to_weight = te.gradient_products(part, rounded_weight[first:end], rounded_hidden)
            else:
                to_hidden = _product(part, rounded_weight[first:end])
                to_weight = _product(part.t(), rounded_hidden)
            d_hidden += to_hidden
            d_weight[first:end] += to_weight
        d_weight_out = d_weight.to(weight.dtype) if ctx.buffer is None else None
        return d_hidden.to(hidden.dtype), d_weight_out, None, None, None
