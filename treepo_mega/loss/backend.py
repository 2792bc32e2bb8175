"""Which implementation of the head runs here: decided once, at the start, and loudly.

`auto` takes the fused kernels on a GPU that has what they are written for (TMA and its tensor cores: Hopper on) and
tiles of torch elsewhere. What was asked for by name runs or is an error: an FP8 head on a GPU without FP8 products
would be slower than bf16 and less exact. On a CPU precision fp8 is emulated: there one wants to know what it does.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from treepo_mega.config import ConfigError, LossConfig
from treepo_mega.loss.te import transformer_engine
from treepo_mega.runtime.device import compute_capability

Backend = Literal["torch", "triton"]
NEEDED = (9, 0)
"""Compute capability of the first GPU with TMA."""


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


def resolve_backend(head: LossConfig) -> Backend:
    """The backend of this process for `loss.head`. Raises ConfigError when what was asked for cannot run here."""
    if head.backend == "torch":
        return "torch"
    missing = missing_for_kernels()
    if missing is None:
        if head.fp8_grads:
            transformer_engine("loss.fp8_grads")
        return "triton"
    if head.backend == "triton":
        raise ConfigError(f"loss.backend=triton cannot run: {missing}. Use loss.backend=torch")
    if compute_capability() is not None and "fp8" in (head.precision, head.logprob_precision):
        raise ConfigError(
            f"loss.precision=fp8 cannot run on this GPU: {missing}. Use bf16, or emulate it with loss.backend=torch"
        )
    return "torch"
