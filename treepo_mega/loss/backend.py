"""Which implementation of the head runs here: decided once, at the start, and loudly.

`auto` takes the fused kernels on a GPU that has what they are written for (TMA and its tensor cores: Hopper on) and
tiles of torch elsewhere. fp32 always runs in tiles of torch, also where it stands beside FP8 or bf16: its kernels
spill 28 KB of registers a thread.

What was asked for by name runs or is an error: an FP8 head on a GPU without FP8 products would be slower than bf16
and less exact. On a CPU precision fp8 is emulated: there one wants to know what it does.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from treepo_mega.config import ConfigError, LossConfig
from treepo_mega.loss.operands import Precision
from treepo_mega.loss.te import transformer_engine
from treepo_mega.runtime.device import compute_capability

Backend = Literal["torch", "triton"]
NEEDED = (9, 0)
"""Compute capability of the first GPU with TMA."""
PASSES = 2
"""Kinds of passes that have a precision: the update, and old and reference logprobs."""


def missing_for_kernels() -> str | None:
    """Why the fused kernels cannot run in this process; None when they can."""
    capability = compute_capability()
    if capability is None:
        return "torch sees no GPU"
    if capability < NEEDED:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, they need {NEEDED[0]}.{NEEDED[1]}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def fp32_keys(head: LossConfig) -> list[str]:
    """The keys of `loss` by which a pass runs in fp32, where nothing else is said."""
    precision = head.precision or "fp32"
    passes = {"precision": precision, "logprob_precision": head.logprob_precision or precision}
    return [f"loss.{key}" for key, value in passes.items() if value == "fp32"]


def backend_of(chosen: Backend, precision: Precision) -> Backend:
    """The backend of one pass where `chosen` is the process's."""
    # The fp32 kernels are exact, and the interpreter's tests use them, but compiled they spill (28 KB a thread on
    # sm_90) and use no tensor core.
    return "torch" if precision == "fp32" else chosen


def resolve_backend(head: LossConfig) -> Backend:
    """The backend of this process for `loss`. Raises ConfigError when what was asked for cannot run here."""
    in_fp32 = fp32_keys(head)
    if head.backend == "torch" or (head.backend == "auto" and len(in_fp32) == PASSES):
        return "torch"
    missing = missing_for_kernels()
    if missing is None and head.backend == "triton" and in_fp32:
        missing = f"the fp32 kernels spill 28 KB of registers a thread, and fp32 is in {' and '.join(in_fp32)}"
    if missing is None:
        if head.fp8_grads:
            transformer_engine("loss.fp8_grads")
        return "triton"
    if head.backend == "triton":
        raise ConfigError(f"loss.backend=triton cannot run: {missing}. Use loss.backend=torch, or auto")
    if compute_capability() is not None and "fp8" in (head.precision, head.logprob_precision):
        raise ConfigError(
            f"loss.precision=fp8 cannot run on this GPU: {missing}. Use bf16, or emulate it with loss.backend=torch"
        )
    return "torch"
