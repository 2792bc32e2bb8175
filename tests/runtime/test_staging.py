"""Copies to a device that is behind: bytes of a buffer stay until its fence, and buffers are taken once.

The device here copies only when someone waits for it, or at the end.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.runtime import device, staging
from treepo_mega.runtime.staging import BUFFERS, Staging, staged

CPU = torch.device("cpu")


class LateDevice:
    """Queues copies; a fence runs those that were queued before it."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.taken: list[int] = []

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.queue.append((target, source))

    def fence(self):
        until = len(self.queue)
        return lambda: self.run(until)

    def run(self, until: int) -> None:
        for target, source in self.queue[self.done : until]:
            target.copy_(source)
        self.done = max(self.done, until)

    def buffer(self, nbytes: int) -> torch.Tensor:
        self.taken.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def staging(self, nbytes: int) -> Staging:
        return Staging(CPU, nbytes, self.buffer, self.send, self.fence)


ARRAYS = st.lists(
    st.tuples(
        st.integers(0, 150),
        st.sampled_from([np.float64, np.float32, np.int64, np.int32, np.bool_]),
        st.sampled_from([None, torch.float32, torch.float64]),
    ),
    min_size=1,
    max_size=30,
)


@given(ARRAYS, st.sampled_from([64, 200, 256, 4096]))
def test_arrays_arrive_whole_whenever_the_device_copies_them(arrays, nbytes):
    late = LateDevice()
    stage = late.staging(nbytes)
    draw = np.random.default_rng(0)
    sources = [(draw.integers(0, 100, size).astype(kind), dtype) for size, kind, dtype in arrays]
    copies = [stage.copy(values, dtype) for values, dtype in sources]
    late.run(len(late.queue))
    for (values, dtype), copied in zip(sources, copies, strict=True):
        want = torch.from_numpy(values).to(dtype=dtype)
        assert copied.dtype == want.dtype and torch.equal(copied, want)


def test_a_buffer_that_is_filled_before_its_fence_loses_what_it_held():
    """Without the waits this device shows it: the test above can fail."""
    late = LateDevice()
    stage = Staging(CPU, 64, late.buffer, late.send, lambda: lambda: None)
    copies = [stage.copy(np.full(8, number)) for number in range(4)]
    late.run(len(late.queue))
    assert [int(copied[0]) for copied in copies] == [2, 3, 2, 3]


def test_buffers_are_taken_by_the_first_copy_and_never_again():
    late = LateDevice()
    stage = late.staging(1024)
    assert late.taken == []
    for _ in range(500):
        stage.copy(np.arange(300))
    assert late.taken == [1024] * BUFFERS
    # An array of 2400 bytes fills 2.3 buffers: the device is waited for once a buffer, not once a copy.
    assert late.done >= len(late.queue) - 5


def test_shapes_and_dtypes_are_the_arrays(monkeypatch):
    late = LateDevice()
    monkeypatch.setattr(staging, "_staging", lambda _: late.staging(256))
    values = np.arange(120).reshape(2, 3, 20)[:, ::2]
    copied = staged(values, torch.device("meta"), torch.int32)
    late.run(len(late.queue))
    assert copied.dtype == torch.int32 and copied.tolist() == values.tolist()


def test_on_a_cpu_an_array_is_only_looked_at(monkeypatch):
    monkeypatch.setattr(staging, "_staging", lambda _: pytest.fail("a CPU needs no buffers"))
    values = np.arange(5)
    assert staged(values, CPU).data_ptr() == values.ctypes.data
    assert staged(values, CPU, torch.float32).tolist() == values.tolist()


@pytest.mark.parametrize("cuda", [True, False])
def test_memory_is_pinned_and_work_is_waited_for_where_there_is_a_gpu(monkeypatch, cuda):
    asked: list[object] = []

    class Event:
        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

    monkeypatch.setattr(device, "has_cuda", lambda: cuda)
    monkeypatch.setattr(device.torch, "empty", lambda *size, **options: asked.append((size, options)))
    monkeypatch.setattr(device.torch.cuda, "Event", Event)
    device.host_buffer(100)
    assert asked == [((100,), {"dtype": torch.uint8, "pin_memory": cuda})]
    device.fence()()
    assert asked[1:] == (["record", "synchronize"] if cuda else [])


def test_the_device_is_not_waited_for_by_a_copy():
    asked: list[object] = []
    target = SimpleNamespace(copy_=lambda source, **options: asked.append((source, options)))
    device.send(target, "pinned")
    assert asked == [("pinned", {"non_blocking": True})]
