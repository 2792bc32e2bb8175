"""Which device this process computes on. The only module that asks torch whether there is a GPU.

On a machine with CUDA every rank takes GPU `LOCAL_RANK` and talks NCCL; without, everything runs on the
CPU over gloo. Nothing else in the project calls `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def has_cuda() -> bool:
    """True when torch sees a GPU that it can use."""
    return torch.cuda.is_available()


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of this rank's GPU, such as (9, 0) for Hopper; None without one."""
    return torch.cuda.get_device_capability(device()) if has_cuda() else None


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda() else torch.device("cpu")


def name() -> str:
    """What the driver calls this rank's device, such as "NVIDIA H100 80GB HBM3"; "cpu" without a GPU."""
    return torch.cuda.get_device_name(device()) if has_cuda() else "cpu"


def backend() -> str:
    """torch.distributed backend: NCCL for CUDA tensors with gloo for CPU ones, gloo alone without a GPU."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def bind() -> torch.device:
    """Make this rank's device current and return it; call once, before any collective."""
    if has_cuda():
        torch.cuda.set_device(device())
    return device()


def select(chosen: torch.device) -> None:
    """Make a GPU current that is not this rank's by `LOCAL_RANK`; a CPU always is."""
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)


def wait_for(chosen: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)


def free_memory_bytes() -> int:
    """Memory of the device that nobody has: as CUDA counts it; 0 on the CPU, where host memory is everyone's."""
    return torch.cuda.mem_get_info(device())[0] if has_cuda() else 0


def release_cached_memory() -> None:
    """Give freed memory that torch keeps for itself back to the device, where the engine can take it. CPU: nothing."""
    if has_cuda():
        torch.cuda.empty_cache()


class PeakMemory:
    """The largest memory of this process since a `reset`: on CUDA what torch has allocated, else what is resident.

    Without CUDA the kernel keeps the peak (VmHWM) and can forget it (`clear_refs`), on Linux.
    """

    def reset(self) -> None:
        """Begin a new peak."""
        if has_cuda():
            torch.cuda.reset_peak_memory_stats(device())
            return
        # A container may forbid it: the peak is then that of the whole process, which is said by its growing only.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_bytes(self) -> int:
        """The largest since then; 0 where the system does not say."""
        if has_cuda():
            return torch.cuda.max_memory_allocated(device())
        try:
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return 0
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) << 10 if found else 0


def host_buffer(nbytes: int) -> Tensor:
    """Host memory, uint8 [nbytes]: pinned where there is a GPU, so that copies need not wait. Take it once: slow."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=has_cuda())


def send(target: Tensor, source: Tensor) -> None:
    """Copy a part of a host buffer to the device, on its current stream, without waiting. Keep it until a fence."""
    target.copy_(source, non_blocking=True)


def fence() -> Callable[[], None]:
    """A wait for what the device's current stream has been given by now; on a CPU, where all is done, for nothing."""
    if not has_cuda():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
