"""Between ranks of one node on the CPU: a receiver reads a parcel where its source packed it.

Every rank owns a segment: an anonymous memory file, which vanishes with its process. It holds two counters and the two
send buffers. Ranks that exchange parcels map each other's segments, so nothing is copied on the way and receivers
need no buffer.

    run(n)       sets the counter `published` to n + 1     received(n) waits for that of each source
    release(n)   sets the counter `consumed` to n + 1      wait_sent(n) waits for that of each receiver

Counters go on over the calls, so that no call mistakes the round of an earlier call for its own. Every wait has a
deadline, and its error names the rank that was waited for.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import Tensor

from treepo_mega.reshard.plan import Parcel
from treepo_mega.reshard.transport.base import IN_FLIGHT, TransportError
from treepo_mega.runtime import dist

_HEADER = 4096
# A cache line apart, so that writing one counter does not evict the other from a reader's cache.
_PUBLISHED = 0
_CONSUMED = 64
"""Byte offsets of the two counters."""

_SHORTEST_PAUSE_S = 2e-5
_LONGEST_PAUSE_S = 1e-3


class _Segment:
    """A file in memory with two counters and a data area of `size` bytes, mapped into this process."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        # An open descriptor keeps the memory of the file: it goes with the segment, not with the process.
        weakref.finalize(self, os.close, fd)
        self.map = mmap.mmap(fd, _HEADER + size)
        self.bytes = torch.frombuffer(memoryview(self.map)[_HEADER:], dtype=torch.uint8) if size else torch.empty(0)

    @classmethod
    def create(cls, size: int) -> _Segment:
        fd = os.memfd_create("treepo_mega_reshard")
        os.ftruncate(fd, _HEADER + size)
        return cls(fd, size)

    @classmethod
    def of_peer(cls, pid: int, fd: int, size: int) -> _Segment:
        # An anonymous file has no path of its own; a process of the same user reaches it through its owner's /proc.
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        return cls(opened, size)

    # Counters are read and written through the kernel: unlike plain stores into the map, such calls cannot be
    # reordered with the copies around them.
    def get(self, where: int) -> int:
        return int(np.frombuffer(os.pread(self.fd, 8, where), np.int64)[0])

    def set(self, where: int, value: int) -> None:
        os.pwrite(self.fd, np.int64(value).tobytes(), where)


class SharedMemoryTransport:
    """See the module's page. `send_buffers` [IN_FLIGHT, slot_elements] lie in this rank's segment.

    `peers`: the ranks of this node with which it exchanges parcels. `rounds`: of a call. Building is collective over
    all ranks of the job, also over those without peers.
    """

    def __init__(
        self,
        *,
        rank: int,
        peers: Collection[int],
        rounds: int,
        slot_elements: int,
        dtype: torch.dtype,
        timeout_s: float,
    ) -> None:
        self._rank = rank
        self._rounds = rounds
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._rounds_before = 0  # in earlier calls
        self._wanted: dict[int, list[Parcel]] = defaultdict(list)
        self._receivers: dict[int, set[int]] = defaultdict(set)
        size = IN_FLIGHT * slot_elements * dtype.itemsize
        self._own = _Segment.create(size)
        shape = (IN_FLIGHT, slot_elements)
        self.send_buffers = self._own.bytes.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
        segments = dist.gather_objects([os.getpid(), self._own.fd, size])
        self._peers = {peer: _Segment.of_peer(*segments[peer]) for peer in sorted(peers)}
        # No rank may go on, or end, before its segment is mapped everywhere.
        dist.gather_objects(None)

    @property
    def buffer_bytes(self) -> int:
        """The two send buffers."""
        return self.send_buffers.nbytes

    def submit_send(self, number: int, parcel: Parcel, target: int) -> None:
        """Note who will read this round's buffer."""
        self._receivers[number].add(target)

    def submit_recv(self, number: int, parcel: Parcel) -> None:
        """Note what to read."""
        self._wanted[number].append(parcel)

    def run(self, number: int) -> None:
        """Publish this rank's buffer."""
        # The last act of a round: receivers read the buffer as soon as the counter has passed.
        self._own.set(_PUBLISHED, self._count_after(number))

    def received(self, number: int) -> Iterator[tuple[Parcel, Tensor]]:
        """Views of the sources' buffers, in the order of submission."""
        for parcel in self._wanted.pop(number, ()):
            self._wait_for(parcel.source, _PUBLISHED, number, "publish its parcels of")
            buffers = self._peers[parcel.source].bytes.view(self._dtype).view(IN_FLIGHT, -1)
            # A view is valid until `release`: then the source may pack a later round over it.
            yield parcel, buffers[number % IN_FLIGHT, parcel.offset : parcel.offset + parcel.numel]

    def release(self, number: int) -> None:
        """Tell the sources that this rank is done with their buffers."""
        self._own.set(_CONSUMED, self._count_after(number))

    def wait_sent(self, number: int) -> None:
        """Wait until every receiver has released the round."""
        for target in self._receivers.pop(number, ()):
            self._wait_for(target, _CONSUMED, number, "take its parcels of")

    def end(self) -> None:
        """Count on from here."""
        self._rounds_before += self._rounds

    def _count_after(self, number: int) -> int:
        """The value of a counter that has passed round `number` of this call."""
        return self._rounds_before + number + 1

    def _wait_for(self, peer: int, counter: int, number: int, what: str) -> None:
        """Poll until the peer's counter has passed the round."""
        pause = _SHORTEST_PAUSE_S
        deadline = time.monotonic() + self._timeout_s
        while self._peers[peer].get(counter) < self._count_after(number):
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank {self._rank} waited {self._timeout_s:.0f} s for rank {peer} to {what} round {number} of "
                    f"{self._rounds} of the reshard"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
