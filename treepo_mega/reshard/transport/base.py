"""What every transport does: take submitted parcels, run a round, hand out what arrived.

    for number in range(rounds + 1):
        transport.wait_sent(number - 2)              # round number - 2 used the same buffer
        ...pack round `number`, each parcel at its offset...
        transport.submit_recv(number, parcel)        # for each parcel that this rank wants from this transport
        transport.submit_send(number, parcel, rank)  # for each rank that wants one of this rank's parcels
        transport.run(number)                        # returns at once: the parcels are on their way
        for parcel, values in transport.received(number - 1): ...
        transport.release(number - 1)
    transport.end()

The verbs are those of Megatron's copy services. One thing differs: `run` does not wait. Two rounds are in flight, so
that a round is packed while the round before it is unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from treepo_mega.errors import RankLost
from treepo_mega.reshard.plan import Parcel

IN_FLIGHT = 2
"""Rounds whose buffers are in use at the same time; round n uses buffer n % IN_FLIGHT."""


class TransportError(RankLost):
    """A rank did not deliver or take its parcels in time; the message names it."""


class Transport(Protocol):
    """Carries parcels between this rank and some others. Rounds are numbered from 0 in every call of the resharder."""

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers that this transport allocated, bytes."""

    def submit_send(self, number: int, parcel: Parcel, target: int) -> None:
        """Rank `target` gets `parcel`, which lies at its offset in the send buffer of round `number`."""

    def submit_recv(self, number: int, parcel: Parcel) -> None:
        """This rank wants `parcel` of round `number` from its source."""

    def run(self, number: int) -> None:
        """Start everything submitted for round `number`. Does not wait."""

    def received(self, number: int) -> Iterator[tuple[Parcel, Tensor]]:
        """The parcels of round `number` with their values [numel], each as soon as it is here.

        The values are valid until `release`. Raises TransportError at the deadline.
        """

    def release(self, number: int) -> None:
        """This rank has unpacked round `number`: its sources may overwrite what they sent."""

    def wait_sent(self, number: int) -> None:
        """Wait until all that round `number` sent was taken: its buffer is free. Earlier than round 0: returns.

        Raises TransportError at the deadline.
        """

    def end(self) -> None:
        """All rounds of this call are over and taken; the next call begins with round 0."""
