"""vLLM's CPU build made to run what CUDA runs: async scheduling with a queue of two, and model runner V2.

    TREEPO_ENGINE_PROFILE=cuda pytest tests/engine          # both
    TREEPO_ENGINE_PROFILE=async pytest tests/rollout        # async scheduling alone, on model runner V1

For tests and benchmarks only: it is slow, and it says nothing of CUDA's kernels. `make test-cuda-profile` runs it.
Nothing here runs unless the variable is set, and it has no effect on a machine with CUDA.

- vLLM's CPU platform switches async scheduling off. It is wrapped so that it keeps what was asked for.
- The asynchronous copies of the runner use CUDA streams and events. On a CPU they become objects that do nothing:
  every operation is finished when its call returns.
- Runner V2 asks for Triton with a CPU backend, which no wheel has. A stand-in says that one is there, and Triton's
  interpreter computes V2's small kernels.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from typing import Any

import torch

from treepo_mega.engine.stream import EngineError
from treepo_mega.errors import nearest
from treepo_mega.runtime.device import has_cuda

VARIABLE = "TREEPO_ENGINE_PROFILE"
PROFILES = ("cuda", "async")


def profile() -> str:
    """The profile that the environment asks for: one of PROFILES, or "" for the CPU's own engine.

    Raises EngineError for any other value.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in PROFILES:
        raise EngineError(
            f"{VARIABLE}={asked}: expected {' or '.join(PROFILES)}, or nothing for the CPU's own engine"
            f"{nearest(asked, PROFILES)}"
        )
    return "" if has_cuda() else asked


@functools.cache
def apply() -> str:
    """Prepare this process for the profile that the environment asks for; returns it.

    Raises EngineError for an unknown profile, and when Triton or vLLM was imported too early for runner V2.
    """
    asked = profile()
    if asked == "cuda":
        _interpret_triton()
    if asked:
        _keep_async_scheduling()
        _streams_that_do_nothing()
    return asked


def _interpret_triton() -> None:
    """Triton's kernels run in its interpreter, and vLLM finds a Triton for the CPU."""
    # A kernel is interpreted or not from its definition on, and vLLM looks for Triton once, at its import.
    late = "vllm.triton_utils" in sys.modules or ("triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1")
    if late:
        raise EngineError(
            f"{VARIABLE}=cuda: Triton or vLLM was imported before the profile could be applied; call "
            "treepo_mega.engine.cuda_profile.apply() first"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = types.SimpleNamespace(driver=_ActiveDriver)


class _ActiveDriver:
    """What vLLM asks of a Triton backend."""

    @staticmethod
    def is_active() -> bool:
        """Always."""
        return True


def _keep_async_scheduling() -> None:
    """`CpuPlatform.check_and_update_config` with `async_scheduling` as it was before."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(keep)


class _Finished:
    """A CUDA stream or event on a CPU: whatever is asked of it has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Finished:
        return self

    def __exit__(self, *error: object) -> bool:
        return False


def _streams_that_do_nothing() -> None:
    torch.cuda.Stream = torch.cuda.Event = torch.Event = _Finished
    torch.cuda.current_stream = lambda *args, **kwargs: _Finished()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
