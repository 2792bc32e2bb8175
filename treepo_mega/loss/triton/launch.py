"""Calls of the kernels: tensors in, tensors out; every shape, stride and split is decided here.

Works on CUDA tensors, and on CPU tensors when TRITON_INTERPRET=1 was set before this module was imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from treepo_mega.config import AlgoConfig
from treepo_mega.loss.quantize import BLOCK, Passes, Recipe, Split, quantize
from treepo_mega.loss.triton import kernels, rows

BM = BN = 128
"""Rows and vocabulary columns of a program's tile: no spills on sm_90 and sm_100 (tools/bench/kernel_report.py)."""
DEPTH = {torch.float32: 32, torch.bfloat16: 64, torch.float8_e4m3fn: 128}
"""K of a tile: 128 bytes, the widest row that the shared-memory swizzle takes."""
LOUD = DEPTH[torch.bfloat16]
"""Most channels that may stay in bf16: one tile's worth."""
TILES = 8
"""Vocabulary tiles a forward program walks over; partial results take 16 bytes a row for each TILES * BN columns."""
WARPS = 8
STAGES = 4
SPLIT_ACCUMULATOR = 128
"""Products after which an fp8 sum leaves the tensor core's short accumulator (0 on the way in: never on Hopper)."""
MODES: dict[Recipe, int] = {"tensorwise": 0, "rowwise": 1, "blockwise": 2}


@dataclass(frozen=True, slots=True)
class Matrix:
    """An operand [N, K] as kernels take it: rows 16-byte aligned, with the scales of `mode`."""

    data: Tensor
    scale: Tensor
    mode: int
    loud: Tensor | None = None
    """Channels that stay in bf16 [N, LOUD], zeros after the real ones."""

    def descriptors(self, block_rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
        """TMA descriptors of `data` and `loud` (without: `data` once more) in tiles of `block_rows` rows.

        What is out of bounds reads as 0.
        """
        main = _descriptor(self.data, block_rows)
        return main, main if self.loud is None else _descriptor(self.loud, block_rows)


def _descriptor(x: Tensor, block_rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [block_rows, DEPTH[x.dtype]])


def empty_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [n, k] whose rows begin at multiples of 16 bytes."""
    return torch.empty(count, _aligned(width, dtype), dtype=dtype, device=device)[:, :width]


def _aligned(width: int, dtype: torch.dtype) -> int:
    per = 16 // dtype.itemsize
    return -(-width // per) * per


def plain(matrix: Tensor) -> Matrix:
    """fp32 or bf16 [N, K]; copied only when its rows are not aligned."""
    # TMA wants a base and rows at multiples of 16 bytes.
    if matrix.stride(1) != 1 or matrix.stride(0) != _aligned(matrix.stride(0), matrix.dtype) or matrix.data_ptr() % 16:
        matrix = empty_rows(*matrix.shape, matrix.dtype, matrix.device).copy_(matrix)
    return Matrix(matrix, torch.ones(1, device=matrix.device), 0)


def scaled(operand: Split, rows: int) -> Matrix:
    """The first `rows` rows of a quantised operand."""
    data = operand.rest.data[:rows]
    if data.stride(0) != _aligned(data.stride(0), data.dtype):
        data = empty_rows(*data.shape, data.dtype, data.device).copy_(data)
    # The kernel's tile of loud channels has one width: zeros add nothing to a product.
    loud = None
    if len(operand.channels):
        loud = torch.nn.functional.pad(operand.loud[:rows], (0, LOUD - len(operand.channels)))
    return Matrix(data, operand.rest.scale.reshape(-1).contiguous(), MODES[operand.rest.recipe], loud)


def _maxima(x: Tensor, recipe: Recipe, block_rows: int, valid: int) -> Tensor:
    """See `quantize.Passes`."""
    count, width = x.shape
    blocks = -(-width // BLOCK)
    amax = torch.zeros(count, blocks, device=x.device)
    if count:
        rows.amax_kernel[(triton.cdiv(count, 32), blocks)](
            x, amax, count, width, x.stride(0), blocks, BM=32, BLOCK=BLOCK
        )
    # Padding must not set the scale of real rows that share its block.
    amax[valid:] = 0
    if recipe == "tensorwise":
        return amax.amax() if count else amax.new_zeros(())
    if recipe == "rowwise":
        return amax.amax(1)
    if block_rows == 1:
        return amax
    return torch.nn.functional.pad(amax, (0, 0, 0, -count % block_rows)).view(-1, block_rows, blocks).amax(1)


def _cast(x: Tensor, factor: Tensor, recipe: Recipe, block_rows: int, dtype: torch.dtype) -> Tensor:
    """See `quantize.Passes`; rows of the result are aligned."""
    count, width = x.shape
    blocks = -(-width // BLOCK)
    out = empty_rows(count, width, dtype, x.device)
    strides = {"tensorwise": (0, 0), "rowwise": (1, 0), "blockwise": (blocks, 1)}[recipe]
    if count:
        rows.cast_kernel[(triton.cdiv(count, 32), blocks)](
            x, out, factor, count, width, x.stride(0), out.stride(0), *strides,
            SHARED_ROWS=block_rows, LARGEST=torch.finfo(dtype).max, BM=32, BLOCK=BLOCK,
        )  # fmt: skip
    return out


quantize_rows = partial(quantize, passes=Passes(_maxima, _cast))
"""`loss/quantize.py`'s quantize with the two passes over x [N, K] in kernels; the same errors and numbers."""


def _both(a: Matrix, b: Matrix) -> tuple[TensorDescriptor, ...]:
    """a, b, and their loud channels."""
    a_main, a_loud = a.descriptors(BM)
    b_main, b_loud = b.descriptors(BN)
    return a_main, b_main, a_loud, b_loud


def _common(a: Matrix, b: Matrix) -> dict[str, Any]:
    """Compile-time arguments that both products share."""
    fp8 = a.data.dtype == torch.float8_e4m3fn
    return {
        "LOUD": a.loud is not None,
        "MODE": a.mode,
        "IMPRECISE": SPLIT_ACCUMULATOR if fp8 else 0,
        "PRECISION": "ieee",
        "BM": BM,
        "BN": BN,
        "BK": DEPTH[a.data.dtype],
        "num_warps": WARPS,
        "num_stages": STAGES,
    }


def forward(a: Matrix, b: Matrix, column: Tensor, given: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(peak [T], sums [3, T]) of hidden a [T, K] and weight b [V, K], fp32; T and V at least 1.

    column [T]: the target's column in this shard or -1; given [T]: its logit after temperature.
    """
    tokens, width = a.data.shape
    vocabulary = b.data.shape[0]
    splits = triton.cdiv(vocabulary, BN * TILES)
    partial = torch.empty(3, splits, tokens, device=a.data.device)
    kernels.forward_kernel[(triton.cdiv(tokens, BM), splits)](
        *_both(a, b), a.scale, b.scale, column, partial,
        tokens, vocabulary, width, triton.cdiv(width, BLOCK), splits, 1.0 / temperature, TILES=TILES, **_common(a, b),
    )  # fmt: skip
    peak = torch.empty(tokens, device=partial.device)
    sums = torch.empty(3, tokens, device=partial.device)
    rows.combine_kernel[(triton.cdiv(tokens, 256),)](partial, column, given, peak, sums, tokens, splits, BM=256)
    return peak, sums


@dataclass(frozen=True, slots=True)
class Slopes:
    """Per row [T], fp32: what `forward` found and what the loss wants."""

    lse: Tensor
    entropy: Tensor
    g_logp: Tensor
    g_entropy: Tensor | None


def dlogits(
    a: Matrix, b: Matrix, column: Tensor, given: Tensor, temperature: float, slopes: Slopes, first: int,
    dz: Tensor, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write d loss / d logits for the columns from `first` into dz [T, n]; fp8 dz is divided by `scale` [T]."""
    tokens, width = a.data.shape
    vocabulary = b.data.shape[0]
    # An argument that the kernel does not use still needs a pointer: `lse` stands in.
    kernels.dlogits_kernel[(triton.cdiv(tokens, BM), triton.cdiv(dz.shape[1], BN))](
        *_both(a, b), a.scale, b.scale, column, given, slopes.lse, slopes.entropy, slopes.g_logp,
        slopes.lse if slopes.g_entropy is None else slopes.g_entropy, dz, slopes.lse if scale is None else scale,
        first, tokens, vocabulary, width, triton.cdiv(width, BLOCK), dz.stride(0), 1.0 / temperature,
        ENTROPY=slopes.g_entropy is not None, ROW_SCALE=scale is not None, **_common(a, b),
    )  # fmt: skip


STATISTICS = ("loss", "pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "tis_weight", "max_ratio_diff")


def policy(
    logp: Tensor, entropy: Tensor, given: dict[str, Tensor], algo: AlgoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(d loss / d logp [T], statistics [] by name) of `loss/policy.py`; all inputs fp32 [T]."""
    tokens = logp.shape[0]
    programs = max(triton.cdiv(tokens, 256), 1)
    slope = torch.empty_like(logp)
    parts = torch.zeros(len(STATISTICS), programs, device=logp.device)
    kl = {"k1": 1, "k2": 2, "k3": 3}[algo.kl_loss_type] if "ref" in given else 0
    order = (given[name].contiguous() for name in ("old", "weight", "ref" if kl else "old", "A_pos", "A_neg", "n"))
    rows.policy_kernel[(programs,)](
        logp.contiguous(), entropy.contiguous(), *order, slope, parts, tokens, programs,
        1.0 - algo.eps_clip, 1.0 + algo.eps_clip_high, math.inf if algo.eps_clip_c is None else algo.eps_clip_c,
        algo.kl_loss_coef, algo.entropy_coef, KL=kl, BM=256,
    )  # fmt: skip
    sums = parts.sum(1)
    sums[-1] = parts[-1].amax()
    return slope, dict(zip(STATISTICS, sums, strict=True))
