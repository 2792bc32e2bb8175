"""What the head multiplies: hidden states and output weight as its precision sees them.

One template, the precision is a parameter:

    fp32, fp64   the operands as they are (bf16 parameters are widened, which is exact)
    bf16         both rounded to bf16, products and sums in fp32: what a tensor core does
    fp8          both quantised to e4m3 by a recipe (`quantize.py`) but for a few loud channels, sums in fp32; the
                 target's own logit comes from bf16 operands when `exact_target` is on

Gradients. dHidden = dz @ W and dW = dz^T @ hidden take the bf16 operands in precision bf16 and fp8 (`grads: bf16`),
or the quantised operands and e5m2 row-scaled dz (`grads: fp8`, which is what saves the FLOPs of these two products
on a GPU). dW is accumulated in fp32 into what the caller gives: Megatron's main_grad where there is one.

The weight side is prepared once per optimizer step and reused by the old, reference and policy passes: `WeightCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from treepo_mega.loss.quantize import BLOCK, Quantized, Recipe, Split, loud_channels, quantize, split

Precision = Literal["fp32", "bf16", "fp8"]
COLUMNS = 32 * BLOCK
"""Vocabulary columns handled at a time where a temporary is needed: a slice of logits stays in the cache."""


Quantizer = Callable[..., Quantized]
"""`quantize.quantize`, or the kernels' equal of it."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """Precision of the head and of its gradients."""

    precision: Precision = "fp32"
    """fp64 operands keep fp64 whatever this says: for the tests of the formulas."""
    recipe: Recipe = "blockwise"
    exact_target: bool = True
    """fp8 only: the target's logit from bf16 operands."""
    power_of_2_scales: bool = False
    """fp8 blockwise only: Transformer Engine's default."""
    grads: Literal["bf16", "fp8"] = "bf16"
    """Operands of the gradient products in precision fp8."""
    loud_channels: int = 64
    """fp8 only: the columns of hidden states and weight that carry most of the logits' variance stay in bf16."""


class WeightCache:
    """The weight as bf16 or fp8, made once and kept until `clear()` or an in-place change that torch knows of."""

    def __init__(self) -> None:
        self.made = 0
        """How often a weight was prepared: once per optimizer step and precision, when all is well."""
        self._kept: dict[tuple[object, ...], Tensor | Split] = {}

    def clear(self) -> None:
        """Forget everything: the weights have changed. Call it after every optimizer step."""
        # Megatron's optimizers write through `.data`, and that does not raise the weight's version.
        self._kept.clear()

    def quantised(
        self, weight: Tensor, valid: int, numerics: Numerics, hidden: Tensor, by: Quantizer = quantize
    ) -> Split:
        """`weight` [V/tp, K] quantised `by` a function; rows from `valid` on are padding.

        Its loud channels are chosen for the hidden states [N, K] of the first call after `clear()`, and kept.
        """
        key = self._key(weight, valid, numerics.recipe, numerics.power_of_2_scales, numerics.loud_channels)
        if key not in self._kept:
            self.made += 1
            detached = weight.detach()
            channels = loud_channels(hidden, detached[:valid], numerics.loud_channels)
            how = {"block_rows": BLOCK, "valid_rows": valid, "power_of_2_scales": numerics.power_of_2_scales}
            self._kept[key] = split(detached, channels, numerics.recipe, by, **how)
        kept = self._kept[key]
        assert isinstance(kept, Split)
        return kept

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` [V/tp, K] in `dtype`: itself when it is, else a kept copy."""
        if weight.dtype == dtype:
            return weight.detach()
        key = self._key(weight, dtype)
        if key not in self._kept:
            self.made += 1
            self._kept[key] = weight.detach().to(dtype)
        kept = self._kept[key]
        assert isinstance(kept, Tensor)
        return kept

    def _key(self, weight: Tensor, *what: object) -> tuple[object, ...]:
        """What identifies a prepared weight; versions before this one are dropped."""
        # The address alone may be another tensor's by now: the shape and torch's version counter join it.
        same = (weight.data_ptr(), tuple(weight.shape))
        for old in [key for key in self._kept if key[:2] == same and key[2] != weight._version]:
            del self._kept[old]
        return (*same, weight._version, *what)


def column_slices(columns: int, size: int = COLUMNS) -> Iterator[slice]:
    """[0, columns) in slices of `size`."""
    for start in range(0, columns, size):
        yield slice(start, min(start + size, columns))


@dataclass(slots=True)
class Operands:
    """hidden [N, K] and the first `valid` rows of weight [V/tp, K], for one call of the head."""

    hidden: Tensor
    weight: Tensor
    valid: int
    numerics: Numerics
    cache: WeightCache = field(default_factory=WeightCache)
    _hidden8: Split | None = None

    def __post_init__(self) -> None:
        numerics = self.numerics
        # An empty micro-batch must not choose the loud channels that the cache keeps for all that follow.
        if self.fp8 and self.hidden.shape[0]:
            how = {"power_of_2_scales": numerics.power_of_2_scales}
            self._hidden8 = split(self.hidden.detach(), self._weight8().channels, numerics.recipe, quantize, **how)

    def _weight8(self) -> Split:
        return self.cache.quantised(self.weight, self.valid, self.numerics, self.hidden.detach())

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and sums: fp32, or fp64 for fp64 operands."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def fp8(self) -> bool:
        """Are the logits' operands quantised?"""
        return self.numerics.precision == "fp8" and self.hidden.dtype != torch.float64

    @property
    def rounds(self) -> bool:
        """Do gradients see operands rounded to bf16?"""
        return self.numerics.precision != "fp32" and self.hidden.dtype != torch.float64

    def _rows(self, part: slice) -> Tensor:
        """hidden [n, K] for gradients and exact targets, in the dtype of sums."""
        hidden = self.hidden[part].detach()
        return (hidden.bfloat16() if self.rounds else hidden).to(self.dtype)

    def _weights(self, gradients: bool) -> Iterator[tuple[slice, Tensor]]:
        """The weight's rows in the dtype of sums, a slice at a time (all at once where nothing is converted)."""
        weight = self.weight.detach()
        if not self.rounds and weight.dtype == self.dtype:
            yield slice(0, self.valid), weight[: self.valid]
            return
        quantised = self.fp8 and not (gradients and self.numerics.grads == "bf16")
        if quantised:
            kept = self._weight8()
            for columns in column_slices(self.valid):
                yield columns, kept.values(columns)
            return
        weight = self.cache.rounded(self.weight, torch.bfloat16) if self.rounds else weight
        for columns in column_slices(self.valid):
            yield columns, weight[columns].to(self.dtype)

    def logits(self, part: slice, z: Tensor, temperature: float) -> None:
        """Write the logits of rows `part` over `temperature` into z [n, valid]."""
        hidden = self._hidden8.values(part) if self._hidden8 is not None else self._rows(part)
        # Never rounded to bf16: sums stay in fp32 up to the log-softmax, as in the fused kernels.
        for columns, weight in self._weights(gradients=False):
            torch.addmm(z[:, columns], hidden, weight.t(), beta=0, alpha=1 / temperature, out=z[:, columns])

    def exact_targets(self, part: slice, column: Tensor, temperature: float) -> Tensor | None:
        """The logits [n] at `column` [n] from bf16 operands, fp32; None where logits are not quantised."""
        # The target's logit enters the loss directly; the others only through a sum, in which errors average out.
        exact = self.fp8 and self.numerics.exact_target
        return self.dot(part, column) / temperature if exact else None

    def dot(self, part: slice, column: Tensor) -> Tensor:
        """Each row's product [n] with the weight's row `column` [n], operands as gradients see them."""
        weight = self.weight.detach().index_select(0, column)
        return (self._rows(part) * (weight.bfloat16() if self.rounds else weight).to(self.dtype)).sum(1)

    def round_gradient_(self, dz: Tensor) -> None:
        """Round dz [n, valid] in place to what the gradient products take."""
        if not self.rounds:
            return
        if self.fp8 and self.numerics.grads == "fp8":
            for rows in column_slices(dz.shape[0], BLOCK):
                # What is not finite stays so: the step is then skipped, as it is in other precisions.
                sound = dz[rows].isfinite().all(1, keepdim=True)
                rounded = quantize(dz[rows].where(sound, 0.0), "rowwise", format="e5m2").values()
                dz[rows] = rounded.where(sound, float("nan"))
            return
        for columns in column_slices(dz.shape[1]):
            dz[:, columns] = dz[:, columns].bfloat16().to(dz.dtype)

    def add_gradients(self, part: slice, dz: Tensor, d_hidden: Tensor, d_weight: Tensor) -> None:
        """d_hidden[part] = dz @ W and d_weight[:valid] += dz^T @ hidden[part]; d_weight is in the dtype of sums."""
        self.round_gradient_(dz)
        out = d_hidden[part] if d_hidden.dtype == self.dtype else dz.new_empty(dz.shape[0], self.hidden.shape[1])
        # beta 0 overwrites: `out` may be uninitialised, and 0 * NaN would stay NaN.
        first = True
        for columns, weight in self._weights(gradients=True):
            torch.addmm(out, dz[:, columns], weight, beta=0 if first else 1, out=out)
            first = False
        # A shard of nothing but padding has no columns.
        if first:
            out.zero_()
        if out.dtype != d_hidden.dtype:
            d_hidden[part] = out.to(d_hidden.dtype)
        quantised = self._hidden8 is not None and self.numerics.grads == "fp8"
        hidden = self._hidden8.values(part) if quantised and self._hidden8 is not None else self._rows(part)
        d_weight[: self.valid].addmm_(dz.t(), hidden)
