"""The transport of each pair of ranks: shared memory on one node of a CPU job, messages for every other pair.

    transport = TransportByPair(rounds, rank, cluster, dtype=torch.bfloat16, device=device(), timeout_s=600)
    buffer = transport.send_buffer(number)           # [elements]; then as in base.py

One parcel may go to both kinds of receivers, so both transports send from the same two buffers. Building and every
round are collective over the ranks that exchange anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from treepo_mega.reshard.plan import Cluster, Parcel, RankRound
from treepo_mega.reshard.transport.base import IN_FLIGHT, Transport
from treepo_mega.reshard.transport.p2p import PointToPointTransport
from treepo_mega.reshard.transport.shared_memory import SharedMemoryTransport


class TransportByPair:
    """A Transport made of one or two; see the module's page.

    `rounds`: what this rank does in each. `shared_memory` None: on the CPU. False: messages only, as between nodes.
    """

    def __init__(
        self,
        rounds: Sequence[RankRound],
        rank: int,
        cluster: Cluster,
        *,
        dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
        shared_memory: bool | None = None,
    ) -> None:
        self._rounds = len(rounds)
        self._node = rank // cluster.ranks_per_node
        self._ranks_per_node = cluster.ranks_per_node
        self._shared: SharedMemoryTransport | None = None
        slot_elements = max((sum(parcel.numel for parcel in each.sends) for each in rounds), default=0)
        if device.type == "cpu" if shared_memory is None else shared_memory:
            self._shared = SharedMemoryTransport(
                rank=rank,
                peers=self._peers_on_this_node(rounds),
                rounds=len(rounds),
                slot_elements=slot_elements,
                dtype=dtype,
                timeout_s=timeout_s,
            )
            self._send_buffers = self._shared.send_buffers
        else:
            self._send_buffers = torch.empty(IN_FLIGHT, slot_elements, dtype=dtype, device=device)
        inbox = [sum(parcel.numel for parcel in each.receives if not self._is_near(parcel.source)) for each in rounds]
        largest = max(inbox, default=0)
        self._messages = PointToPointTransport(self._send_buffers, largest, rank=rank, timeout_s=timeout_s)

    def _peers_on_this_node(self, rounds: Sequence[RankRound]) -> set[int]:
        sources = {parcel.source for each in rounds for parcel in each.receives}
        receivers = {target for each in rounds for parcel in each.sends for target in parcel.targets}
        return {peer for peer in sources | receivers if peer // self._ranks_per_node == self._node}

    @property
    def buffer_bytes(self) -> int:
        """Memory of this rank's buffers, bytes: two send buffers, and two rounds of messages from other nodes."""
        return self._send_buffers.nbytes + self._messages.buffer_bytes

    def send_buffer(self, number: int) -> Tensor:
        """Where to pack round `number`, [elements], once everyone has taken what it held two rounds ago."""
        self.wait_sent(number - IN_FLIGHT)
        return self._send_buffers[number % IN_FLIGHT]

    def submit_send(self, number: int, parcel: Parcel, target: int) -> None:
        """By the transport of this pair."""
        self._to(target).submit_send(number, parcel, target)

    def submit_recv(self, number: int, parcel: Parcel) -> None:
        """By the transport of this pair."""
        self._to(parcel.source).submit_recv(number, parcel)

    def run(self, number: int) -> None:
        """Start both."""
        for transport in self._transports():
            transport.run(number)

    def received(self, number: int) -> Iterator[tuple[Parcel, Tensor]]:
        """Parcels of this node first: they are read while messages are on their way."""
        for transport in self._transports():
            yield from transport.received(number)

    def release(self, number: int) -> None:
        """Release the round everywhere."""
        for transport in self._transports():
            transport.release(number)

    def wait_sent(self, number: int) -> None:
        """Wait for the receivers of both."""
        for transport in self._transports():
            transport.wait_sent(number)

    def end(self) -> None:
        """Wait until every parcel was taken, so that the next call starts from empty buffers."""
        for number in range(max(0, self._rounds - IN_FLIGHT), self._rounds):
            self.wait_sent(number)
        for transport in self._transports():
            transport.end()

    def _transports(self) -> list[Transport]:
        return [self._messages] if self._shared is None else [self._shared, self._messages]

    def _is_near(self, other: int) -> bool:
        return self._shared is not None and other // self._ranks_per_node == self._node

    def _to(self, other: int) -> Transport:
        return self._shared if self._shared is not None and self._is_near(other) else self._messages
