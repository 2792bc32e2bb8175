"""Between nodes, and always on CUDA: point-to-point messages of the default process group, batched by round.

On CUDA the group is NCCL, which takes NVLink within a node by itself; on the CPU it is gloo. Received parcels lie in an
inbox of two rounds. With gloo a wait ends at the group's own deadline, with the error of torch.distributed. With NCCL
it orders streams and returns. `end` then waits on the host, and names the ranks of a round that is not through after
SHARE of the deadline: NCCL's watchdog would abort the process at the whole of it, without a name. A host that waits for
its device earlier in the call meets the watchdog.

NCCL's first call on a group needs all its ranks, also those without a message. `runtime.dist.initialize` makes it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as torch_dist
from torch import Tensor

from treepo_mega.reshard.plan import Parcel
from treepo_mega.reshard.transport.base import IN_FLIGHT, TransportError

SHARE = 0.9
"""Of the deadline: what the host waits for a round, from its start."""
POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class _Batch:
    """The messages of a round."""

    number: int
    works: list[Any]
    peers: list[int]
    started: float
    """`time.monotonic()`"""

    def is_through(self) -> bool:
        """Whether the device is done with them."""
        return all(work.is_completed() for work in self.works)


class PointToPointTransport:
    """See the module's page. Sends from `send_buffers` [IN_FLIGHT, elements], which it does not own.

    `inbox_elements`: the most that this rank receives in one round.
    """

    def __init__(self, send_buffers: Tensor, inbox_elements: int, *, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._send_buffers = send_buffers
        self._inbox = send_buffers.new_empty(IN_FLIGHT, inbox_elements)
        self._operations: dict[int, list[torch_dist.P2POp]] = defaultdict(list)
        self._arriving: dict[int, list[tuple[Parcel, Tensor]]] = defaultdict(list)
        self._running: dict[int, _Batch] = {}
        self._on_streams: list[_Batch] = []
        """Rounds that only the device's stream has waited for so far."""

    @property
    def buffer_bytes(self) -> int:
        """The inbox."""
        return self._inbox.nbytes

    def submit_send(self, number: int, parcel: Parcel, target: int) -> None:
        """One message to `target`."""
        values = self._send_buffers[number % IN_FLIGHT, parcel.offset : parcel.offset + parcel.numel]
        self._operations[number].append(torch_dist.P2POp(torch_dist.isend, values, target))

    def submit_recv(self, number: int, parcel: Parcel) -> None:
        """One message into the inbox."""
        used = sum(values.numel() for _, values in self._arriving[number])
        values = self._inbox[number % IN_FLIGHT, used : used + parcel.numel]
        self._arriving[number].append((parcel, values))
        self._operations[number].append(torch_dist.P2POp(torch_dist.irecv, values, parcel.source))

    def run(self, number: int) -> None:
        """Start the round's messages as one batch."""
        operations = self._operations.pop(number, [])
        # An empty batch is an error of torch.distributed.
        if operations:
            peers = sorted({operation.peer for operation in operations})
            works = torch_dist.batch_isend_irecv(operations)
            self._running[number] = _Batch(number, works, peers, time.monotonic())

    def received(self, number: int) -> Iterator[tuple[Parcel, Tensor]]:
        """Parts of the inbox, once all messages of the round are through."""
        arriving = self._arriving.pop(number, [])
        if arriving:
            self.wait_sent(number)
        yield from arriving

    def release(self, number: int) -> None:
        """Nothing to do: the source's buffer was free as soon as its message was through."""

    def wait_sent(self, number: int) -> None:
        """Wait for the round's messages, sent and received: the host with gloo, the current stream with NCCL."""
        batch = self._running.pop(number, None)
        if batch is None:
            return
        for work in batch.works:
            work.wait()
        if self._send_buffers.device.type != "cpu":
            self._on_streams = [other for other in (*self._on_streams, batch) if not other.is_through()]

    def end(self) -> None:
        """Wait on the host until all messages are through. Raises TransportError, which names a late round's ranks."""
        for batch in self._on_streams:
            while not batch.is_through():
                if time.monotonic() > batch.started + SHARE * self._timeout_s:
                    peers = ", ".join(f"rank {peer}" for peer in batch.peers)
                    raise TransportError(
                        f"rank {self._rank} waited {SHARE * self._timeout_s:.0f} s for the messages of round "
                        f"{batch.number}, with {peers}. One of them died or is stuck; its own output says why. A slow "
                        "network needs a larger distributed.timeout_s"
                    )
                time.sleep(POLL_S)
        self._on_streams = []
