"""Arrays of the host to the device without waiting for it, through pinned buffers that are taken once.

    target = staged(pack.target, device())          # on a CPU the array itself

A copy from ordinary host memory waits until it is done, and the next kernel is not queued meanwhile. One from pinned
memory does not wait, but the bytes must stay until it has run: each buffer has a fence, and is filled again after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from treepo_mega.runtime.device import fence, host_buffer, send

BUFFERS = 2
BUFFER_BYTES = 8 << 20
"""Arrays of several micro-batches (some 100 bytes a token); a larger array goes through both buffers in parts."""
ALIGNED = 64
"""Bytes: every dtype may begin here."""


@dataclass(slots=True)
class Staging:
    """Buffers in front of one device. The defaults are the device's; tests put their own in their place."""

    device: torch.device
    nbytes: int = BUFFER_BYTES
    buffer: Callable[[int], Tensor] = host_buffer
    send: Callable[[Tensor, Tensor], None] = send
    fence: Callable[[], Callable[[], None]] = fence
    _buffers: list[Tensor] = field(default_factory=list)
    _fences: list[Callable[[], None] | None] = field(default_factory=lambda: [None] * BUFFERS)
    _at: int = 0
    _used: int = 0
    """Bytes of the buffer `_at` that are taken."""

    def copy(self, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """`values` on the device, in `dtype` if given; the copy may still be under way on the current stream."""
        if not self._buffers:
            self._buffers = [self.buffer(self.nbytes) for _ in range(BUFFERS)]
        source = torch.from_numpy(values)
        out = torch.empty(source.shape, dtype=dtype or source.dtype, device=self.device)
        rest_in = source.reshape(-1)
        rest_out = out.view(-1)
        while rest_out.numel():
            place = self._place(rest_out.numel(), out.dtype)
            count = place.numel()
            # Converted here: fewer bytes travel, and the device needs no second tensor.
            place.copy_(rest_in[:count])
            self.send(rest_out[:count], place)
            rest_in = rest_in[count:]
            rest_out = rest_out[count:]
        return out

    def _place(self, wanted: int, dtype: torch.dtype) -> Tensor:
        """Free entries of a buffer, `wanted` of them or as many as there are (at least one)."""
        if self.nbytes - self._used < ALIGNED:
            self._next_buffer()
        count = min(wanted, (self.nbytes - self._used) // dtype.itemsize)
        begin = self._used
        self._used += -(-count * dtype.itemsize // ALIGNED) * ALIGNED
        return self._buffers[self._at][begin : begin + count * dtype.itemsize].view(dtype)

    def _next_buffer(self) -> None:
        """Go on with the other buffer, once the device has read it."""
        self._fences[self._at] = self.fence()
        self._at = (self._at + 1) % BUFFERS
        wait = self._fences[self._at]
        if wait is not None:
            wait()
        self._used = 0


@functools.cache
def _staging(device: torch.device) -> Staging:
    """This process's buffers for a device; its memory is taken by the first copy."""
    return Staging(device)


def staged(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """An array as a tensor of `device`, in `dtype` if given. On a CPU it shares the array's memory where it can."""
    if device.type == "cpu":
        return torch.from_numpy(values).to(device, dtype)
    return _staging(device).copy(values, dtype)
