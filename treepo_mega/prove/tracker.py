"""Bytes of the tensors that are alive, and the most that there ever were.

    with FakeTensorMode(), MemoryTracker() as tracker:
        ...
        before = tracker.used
        tracker.restart()
        step()
        tracker.peak - before          # what the step needed beside what was there

A storage counts from the operation that makes it until nothing refers to it, also where autograd keeps it. Tensors that
share a storage count once. Allocators round up and keep blocks; that is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOTED = 1.001
"""A peak is looked at closely when it is higher than the last one by this factor."""


class MemoryTracker(TorchDispatchMode):
    """See the module docstring. Enter it inside the FakeTensorMode, so that it sees each operation first."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes since the start or `restart`."""
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}
        self._before: set[int] = set()
        self._noted = 0
        self._labels: dict[int, tuple[int, str]] = {}

    def restart(self) -> None:
        """The peak is taken from now on, and `largest` leaves out what is alive now."""
        self.peak = self._noted = self.used
        self._before = set(self._alive)
        self._labels = {}

    def largest(self, count: int = 8) -> list[tuple[str, int, int]]:
        """(operation and shape, how many, their bytes) of what was new at the peak, the most bytes first."""
        sums: dict[str, tuple[int, int]] = {}
        for size, label in self._labels.values():
            number, total = sums.get(label, (0, 0))
            sums[label] = (number + 1, total + size)
        ranked = sorted(((label, *found) for label, found in sums.items()), key=lambda item: -item[2])
        return ranked[:count]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and take note of the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, func)
        return out

    def _note(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        # Not the address: storages of fake tensors have none.
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        label = f"{func.overloadpacket.__name__} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        self._alive[key] = (weakref.ref(storage, lambda _: self._freed(key)), size, label)
        self.used += size
        self.peak = max(self.peak, self.used)
        # Not at each new peak: on the way up there is one at nearly every operation.
        if self.used > NOTED * self._noted:
            self._noted = self.used
            self._labels = {each: kept[1:] for each, kept in self._alive.items() if each not in self._before}

    def _freed(self, key: int) -> None:
        self.used -= self._alive.pop(key)[1]
