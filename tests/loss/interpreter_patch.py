"""What Triton 3.8's interpreter computes wrongly, put right for our tests.

1. A cast of fp32 to fp8 loses the carry of the mantissa (1.97 becomes 1.0) and flushes small numbers; one to bf16
   truncates. Replaced by torch's conversion, which rounds to nearest even; fp8 saturates, as the hardware's cast does.
2. `tl.dot` of bf16 multiplies the bit patterns as integers. Replaced by a product of the widened operands.

`test_triton.py` has a check that fails as soon as the stock interpreter is right: then this file can go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp64": torch.float64,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def convert(data: np.ndarray, source: Any, target: Any, _rounding: Any = None) -> np.ndarray:
    """Bits of `source` numbers -> bits of `target` numbers, rounded to nearest even."""
    src, dst = TORCH[source.name], TORCH[target.name]
    bits = torch.from_numpy(np.ascontiguousarray(data).view(np.dtype(f"i{src.itemsize}")).copy())
    values = bits.view(torch.uint8 if src.itemsize == 1 else BITS[src.itemsize]).view(src)
    if dst in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = values.float().clamp(-torch.finfo(dst).max, torch.finfo(dst).max)
    out = values.to(dst).view(BITS[dst.itemsize]).numpy()
    return out.view(np.dtype(f"u{dst.itemsize}")).reshape(data.shape)


def widen(handle: Any) -> np.ndarray:
    """The numbers of a tensor handle as fp32."""
    if handle.dtype.name in ("fp32", "fp64"):
        return handle.data
    return convert(handle.data, handle.dtype, tl.float32).view(np.float32)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Replacement of InterpreterBuilder.create_dot."""
    return interpreter.TensorHandle(np.matmul(widen(a), widen(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def apply() -> None:
    """Patch the interpreter of this process."""
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
