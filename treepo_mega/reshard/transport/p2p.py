"""Between nodes, and always on CUDA: point-to-point messages of the default process group, batched by round.

On CUDA the group is NCCL, which takes NVLink within a node by itself; on the CPU it is gloo. Received parcels lie in an
inbox of two rounds. With gloo a wait ends at the group's own deadline, with the error of torch.distributed. With NCCL
it orders streams and returns: a missing rank shows when NCCL's watchdog aborts the process, after the same deadline.

NCCL's first call on a group needs all its ranks, also those without a message. `runtime.dist.initialize` makes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch.distributed as torch_dist
from torch import Tensor

from treepo_mega.reshard.plan import Parcel
from treepo_mega.reshard.transport.base import IN_FLIGHT


class PointToPointTransport:
    """See the module's page. Sends from `send_buffers` [IN_FLIGHT, elements], which it does not own.

    `inbox_elements`: the most that this rank receives in one round.
    """

    def __init__(self, send_buffers: Tensor, inbox_elements: int) -> None:
        self._send_buffers = send_buffers
        self._inbox = send_buffers.new_empty(IN_FLIGHT, inbox_elements)
        self._operations: dict[int, list[torch_dist.P2POp]] = defaultdict(list)
        self._arriving: dict[int, list[tuple[Parcel, Tensor]]] = defaultdict(list)
        self._running: dict[int, list[Any]] = {}

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
        self._running[number] = torch_dist.batch_isend_irecv(operations) if operations else []

    def received(self, number: int) -> Iterator[tuple[Parcel, Tensor]]:
        """Parts of the inbox, once all messages of the round are through."""
        arriving = self._arriving.pop(number, [])
        if arriving:
            self.wait_sent(number)
        yield from arriving

    def release(self, number: int) -> None:
        """Nothing to do: the source's buffer was free as soon as its message was through."""

    def wait_sent(self, number: int) -> None:
        """Wait for the round's messages, sent and received."""
        for work in self._running.pop(number, ()):
            # With NCCL this makes the current stream wait, not the host: a missing rank does not show here.
            work.wait()

    def end(self) -> None:
        """Nothing to do."""
