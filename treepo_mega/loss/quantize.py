"""FP8 quantisation with current scaling, in plain torch: the reference that kernels and Transformer Engine must match.

A tensor x [N, K] becomes fp8 data [N, K] and fp32 scales with  x ~ data * scale. Three recipes:

    tensorwise   one scale                            scale []
    rowwise      one scale per row                     scale [N]
    blockwise    blocks of 1 x 128 (activations) or   scale [ceil(N / rows), ceil(K / 128)], rows 1 or 128
                 128 x 128 (weights)

`e4m3` (largest 448) for operands, `e5m2` (largest 57344) for gradients. Current scaling: the scale comes from the
largest magnitude of this very tensor, there is no history. The arithmetic is Transformer Engine's: multiply by
max / amax in fp32, saturate, round to nearest even; `power_of_2_scales` rounds max / amax down to a power of two.

Loud channels. A few columns of a model's last hidden states are ten times louder than the rest. They carry most of
the logits' variance (SmolLM2: 4 of 576 carry two thirds). No scaling helps: e4m3 has three mantissa bits, whatever the
scale. `Split` keeps them in bf16 and quantises the rest; tools/bench/fp8_error.py shows what it buys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from treepo_mega.errors import TreepoError

Recipe = Literal["tensorwise", "rowwise", "blockwise"]
RECIPES: tuple[Recipe, ...] = ("tensorwise", "rowwise", "blockwise")
BLOCK = 128
"""Columns (and rows, for weights) that share a scale in the blockwise recipe."""
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ROWS_AT_A_TIME = 32 * BLOCK
"""Rows converted at a time, so that fp32 temporaries stay small beside a weight matrix."""


class QuantizeError(TreepoError):
    """The tensor cannot be quantised: it holds NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """fp8 data [N, K] and its scales; see the module docstring."""

    data: Tensor
    scale: Tensor
    recipe: Recipe
    block_rows: int = 1

    def values(self, rows: slice = slice(None)) -> Tensor:
        """What the data stands for, fp32 [n, K]: data * scale. `rows` must begin at a multiple of block_rows."""
        data = self.data[rows].float()
        if self.recipe == "tensorwise":
            return data.mul_(self.scale)
        if self.recipe == "rowwise":
            return data.mul_(self.scale[rows, None])
        start, _, _ = rows.indices(self.data.shape[0])
        if start % self.block_rows:
            raise ValueError(
                f"rows begin at {start}, expected a multiple of {self.block_rows}: a block shares its scale"
            )
        return data.mul_(_spread(self.scale[start // self.block_rows :], self.block_rows, data.shape))


@dataclass(frozen=True, slots=True)
class Split:
    """A matrix [N, K] in fp8 but for some columns: `rest` has zeros there, `loud` [N, C] holds them in bf16.

    `loud` is in units of rest's scale where a row has one scale, so that both products can share an accumulator.
    """

    rest: Quantized
    channels: Tensor
    """The columns [C], sorted."""
    loud: Tensor

    def values(self, rows: slice = slice(None)) -> Tensor:
        """What it stands for, fp32 [n, K]; see `Quantized.values`."""
        out = self.rest.values(rows)
        out[:, self.channels] = self.loud[rows].float() * _loud_unit(self.rest, rows)
        return out


def _loud_unit(q: Quantized, rows: slice) -> Tensor | float:
    """The scale of loud channels: that of the row, or 1 where a row has several."""
    if q.recipe == "rowwise":
        return q.scale[rows, None]
    return q.scale if q.recipe == "tensorwise" else 1.0


def loud_channels(hidden: Tensor, weight: Tensor, count: int) -> Tensor:
    """The `count` columns that carry most of the variance of hidden [N, K] @ weight [V, K]^T, sorted.

    At most an eighth of all: a head that keeps more in bf16 is no FP8 head.
    """
    energy = hidden.float().square().mean(0)
    total = torch.zeros_like(energy)
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        total += weight[start : start + ROWS_AT_A_TIME].float().square().sum(0)
    return (energy * total).nan_to_num().topk(min(count, len(energy) // 8)).indices.sort().values


def split(x: Tensor, channels: Tensor, recipe: Recipe, by: Callable[..., Quantized], **how: Any) -> Split:
    """Quantise x [N, K] but for `channels` with the quantiser `by`, which is `quantize` or the kernels' equal of it.

    Raises QuantizeError for NaN and infinity.
    """
    loud = x.index_select(1, channels)
    valid = how.get("valid_rows", x.shape[0])
    # The quantiser sees zeros in these columns, so it cannot refuse what they hold.
    if not bool(loud[:valid].isfinite().all()):
        raise QuantizeError(describe_non_finite(x, valid))
    rest = by(x.index_fill(1, channels, 0) if len(channels) else x, recipe, **how)
    return Split(rest, channels, (loud.float() / _loud_unit(rest, slice(None))).bfloat16())


def _spread(blocks: Tensor, block_rows: int, shape: Any) -> Tensor:
    """One number per block -> one per element [n, k]."""
    rows, columns = shape
    blocks = blocks[: -(-rows // block_rows)].repeat_interleave(block_rows, 0)[:rows]
    return blocks.repeat_interleave(BLOCK, 1)[:, :columns]


def _amax(x: Tensor, recipe: Recipe, block_rows: int) -> Tensor:
    """Largest magnitude per scale of x [n, K], fp32; NaN and infinity carry over."""
    if recipe == "tensorwise":
        return x.abs().amax().float()[None]
    if recipe == "rowwise":
        return x.abs().amax(1).float()
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % BLOCK, 0, -rows % block_rows))
    return padded.view(-1, block_rows, padded.shape[1] // BLOCK, BLOCK).amax((1, 3)).float()


def _maxima(x: Tensor, recipe: Recipe, block_rows: int, valid: int) -> Tensor:
    """Largest magnitude per scale of the whole tensor, padding left out (its own scales get 0)."""
    rows, columns = x.shape
    parts = [
        _amax(x[start : min(start + ROWS_AT_A_TIME, valid)], recipe, block_rows)
        for start in range(0, valid, ROWS_AT_A_TIME)
    ]
    shape = {"tensorwise": (0,), "rowwise": (0,), "blockwise": (0, -(-columns // BLOCK))}[recipe]
    amax = torch.cat(parts) if parts else torch.zeros(shape, device=x.device)
    if recipe == "tensorwise":
        return amax.amax() if len(amax) else torch.zeros((), device=x.device)
    missing = -(-rows // block_rows) - len(amax) if recipe == "blockwise" else rows - len(amax)
    return torch.cat([amax, amax.new_zeros(missing, *amax.shape[1:])])


def _cast(x: Tensor, factor: Tensor, recipe: Recipe, block_rows: int, dtype: torch.dtype) -> Tensor:
    """x [N, K] times the factor of its scale in fp8, ROWS_AT_A_TIME rows at a time."""
    largest = torch.finfo(dtype).max
    data = torch.empty(x.shape, dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], ROWS_AT_A_TIME):
        part = x[start : start + ROWS_AT_A_TIME].float()
        by = factor
        if recipe == "rowwise":
            by = factor[start : start + ROWS_AT_A_TIME, None]
        elif recipe == "blockwise":
            by = _spread(factor[start // block_rows :], block_rows, part.shape)
        # NaN can only be in padding here, and must not travel on.
        data[start : start + ROWS_AT_A_TIME] = (part * by).nan_to_num_().clamp_(-largest, largest).to(dtype)
    return data


def describe_non_finite(x: Tensor, valid: int) -> str:
    """Where the first `valid` rows of x [N, K] hold NaN or infinity, for people."""
    bad = (~x[:valid].isfinite()).nonzero()
    return (
        f"{len(bad)} of {valid * x.shape[1]} values are NaN or infinite, the first at row {int(bad[0, 0])}, column "
        f"{int(bad[0, 1])}: FP8 would turn them into ordinary numbers"
    )


def factors(amax: Tensor, largest: float, power_of_2: bool) -> Tensor:
    """What to multiply with before the cast; 1 where everything is zero."""
    # A tiny `amax` would make the factor infinite, and 0 * inf is NaN.
    factor = torch.where(amax > 0, largest / amax, torch.ones_like(amax)).clamp(max=torch.finfo(torch.float32).max)
    if power_of_2:
        # frexp's mantissa is in [0.5, 1), so 0.5 * 2**exponent rounds down exactly. A rounded log2 could miss a power.
        mantissa, exponent = torch.frexp(factor)
        factor = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return factor


@dataclass(frozen=True, slots=True)
class Passes:
    """The two passes over the data: plain torch here (`TORCH`), kernels in `triton/launch.py`."""

    maxima: Callable[[Tensor, Recipe, int, int], Tensor]
    """(x [N, K], recipe, block_rows, valid rows) -> largest magnitude per scale, fp32; not finite where x is not."""
    cast: Callable[[Tensor, Tensor, Recipe, int, torch.dtype], Tensor]
    """(x [N, K], factor per scale, recipe, block_rows, dtype) -> x * factor [N, K], saturated and rounded."""


TORCH = Passes(_maxima, _cast)


def quantize(
    x: Tensor,
    recipe: Recipe,
    *,
    format: Literal["e4m3", "e5m2"] = "e4m3",
    block_rows: int = 1,
    valid_rows: int | None = None,
    power_of_2_scales: bool = False,
    passes: Passes = TORCH,
) -> Quantized:
    """Quantise x [N, K] (fp32, bf16 or fp64) by `recipe`; `block_rows` (1 or 128) matters to blockwise only.

    Rows from `valid_rows` on are padding. Raises QuantizeError when a valid row holds NaN or infinity. On a GPU that
    check waits for the device.
    """
    valid = x.shape[0] if valid_rows is None else valid_rows
    dtype = FORMATS[format]
    block_rows = block_rows if recipe == "blockwise" else 1
    # Padding is left out of every maximum, so that it does not set the scale of real rows. It saturates if larger.
    amax = passes.maxima(x, recipe, block_rows, valid)
    # torch's cast to e4m3 saturates: an infinity would become 448 in silence.
    if not bool(amax.isfinite().all()):
        raise QuantizeError(describe_non_finite(x, valid))
    factor = factors(amax, torch.finfo(dtype).max, power_of_2_scales)
    return Quantized(passes.cast(x, factor, recipe, block_rows, dtype), 1.0 / factor, recipe, block_rows)
