"""How a round's parcels get from rank to rank: shared memory within a node, the process group beyond it.

    exchange = Exchange(rounds, rank, cluster, dtype=torch.bfloat16, device=device(), timeout_s=600)
    for i ...:
        buffer = exchange.free(i)            # waits until round i - 2 left this buffer; [elements]
        ...pack...                           # at each parcel's offset
        exchange.post(i)
        for parcel, values in exchange.arrived(i - 1): ...
        exchange.release(i - 1)              # acknowledged: the source may overwrite it in round i + 1

Two buffers take turns, so a round is packed while the one before is unpacked.

On the CPU the ranks of a node map each other's buffers (anonymous memory files, which vanish with their processes) and
read parcels where their source packed them: no second copy, no receive buffer. Counters in the same file say which
round is published and which is consumed. Between nodes, and always on CUDA, parcels are point-to-point messages
of the default process group (gloo; NCCL, which takes NVLink itself), batched by round.

Every wait has a deadline and names the rank it waited for.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from treepo_mega.errors import TreepoError
from treepo_mega.reshard.plan import Cluster, Parcel, RankRound
from treepo_mega.runtime import dist

_HEADER = 4096
_PUBLISHED, _CONSUMED = 0, 64
"""Byte offsets of the two counters, a cache line apart."""


class ExchangeError(TreepoError):
    """A rank did not deliver or take its parcels in time; the message names it."""


class _Segment:
    """A file in memory with two counters and a data area, mapped into this process."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, _HEADER + size)
        self.bytes = torch.frombuffer(memoryview(self.map)[_HEADER:], dtype=torch.uint8) if size else torch.empty(0)

    @classmethod
    def create(cls, size: int) -> _Segment:
        fd = os.memfd_create("treepo_mega_reshard")
        os.ftruncate(fd, _HEADER + size)
        return cls(fd, size)

    @classmethod
    def of_peer(cls, pid: int, fd: int, size: int) -> _Segment:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        return cls(opened, size)

    # Reads and writes go through the kernel: unlike plain stores into the map, they cannot be reordered with the
    # copies around them.
    def get(self, where: int) -> int:
        return int(np.frombuffer(os.pread(self.fd, 8, where), np.int64)[0])

    def set(self, where: int, value: int) -> None:
        os.pwrite(self.fd, np.int64(value).tobytes(), where)


class Exchange:
    """See the module's page. Building and every round are collective over the ranks that exchange anything."""

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
        self.rounds, self.rank, self.dtype, self.device, self.timeout_s = rounds, rank, dtype, device, timeout_s
        self._per_node = cluster.ranks_per_node
        self._shared = device.type == "cpu" if shared_memory is None else shared_memory
        self.slot_elements = max((sum(p.numel for p in r.sends) for r in rounds), default=0)
        self._base = 0  # rounds of the calls before this one
        self._works: dict[int, list[Any]] = {}
        far = [sum(p.numel for p in r.receives if not self._near(p.source)) for r in rounds]
        self._inbox = torch.empty(2, max(far, default=0), dtype=dtype, device=device)
        self._received: dict[int, dict[int, Tensor]] = {}
        self._peers: dict[int, _Segment] = {}
        if self._shared:
            self._map_segments()
        else:
            self._slots = torch.empty(2, self.slot_elements, dtype=dtype, device=device)

    def _map_segments(self) -> None:
        """Make this rank's segment and map those of the ranks it exchanges with. Collective over all ranks."""
        size = 2 * self.slot_elements * self.dtype.itemsize
        self._own = _Segment.create(size)
        self._slots = self._own.bytes.view(self.dtype).view(2, self.slot_elements) if size else torch.empty(2, 0)
        told = dist.gather_objects([os.getpid(), self._own.fd, size])
        sources = {p.source for r in self.rounds for p in r.receives}
        takers = {t for r in self.rounds for p in r.sends for t in p.targets}
        for peer in sorted(sources | takers):
            if self._near(peer):
                self._peers[peer] = _Segment.of_peer(*told[peer])
        dist.gather_objects(None)  # no rank goes on, or ends, before its segment is mapped everywhere

    @property
    def buffer_bytes(self) -> int:
        """Memory of this rank's buffers: its two slots, and two rounds of receives from other nodes."""
        return 2 * (self.slot_elements + self._inbox.shape[1]) * self.dtype.itemsize

    def _near(self, other: int) -> bool:
        return self._shared and other // self._per_node == self.rank // self._per_node

    def free(self, i: int) -> Tensor:
        """The buffer of round i, [elements], once everyone has taken what it held two rounds ago."""
        self._finish_sends(i - 2)
        if i >= 2:
            for target in {t for p in self.rounds[i - 2].sends for t in p.targets if self._near(t)}:
                self._await(target, _CONSUMED, i - 2, "take its parcels of")
        return self._slots[i % 2]

    def post(self, i: int) -> None:
        """Make round i's parcels available and ask for those of other nodes."""
        if self._shared:
            self._own.set(_PUBLISHED, self._base + i + 1)
        slot, inbox, at, ops = self._slots[i % 2], self._inbox[i % 2], 0, []
        self._received[i] = {}
        for p in self.rounds[i].receives:
            if not self._near(p.source):
                into = inbox[at : at + p.numel]
                at += p.numel
                self._received[i][id(p)] = into
                ops.append(torch_dist.P2POp(torch_dist.irecv, into, p.source))
        for p in self.rounds[i].sends:
            for target in p.targets:
                if not self._near(target):
                    ops.append(torch_dist.P2POp(torch_dist.isend, slot[p.offset : p.offset + p.numel], target))
        self._works[i] = torch_dist.batch_isend_irecv(ops) if ops else []

    def arrived(self, i: int) -> Iterator[tuple[Parcel, Tensor]]:
        """The parcels of round i with their values [numel], near ones as soon as their source has published them."""
        far = []
        for p in self.rounds[i].receives:
            if not self._near(p.source):
                far.append(p)
                continue
            self._await(p.source, _PUBLISHED, i, "publish its parcels of")
            segment = self._peers[p.source]
            slots = segment.bytes.view(self.dtype).view(2, -1)
            yield p, slots[i % 2, p.offset : p.offset + p.numel]
        if far:
            self._finish_sends(i)
        for p in far:
            yield p, self._received[i][id(p)]

    def release(self, i: int) -> None:
        """Acknowledge round i."""
        if self._shared:
            self._own.set(_CONSUMED, self._base + i + 1)
        self._received.pop(i, None)

    def end(self) -> None:
        """After the last round: wait until every parcel was taken, so that the next call starts from empty buffers."""
        for i in range(max(0, len(self.rounds) - 2), len(self.rounds)):
            self.free(i + 2)
        self._base += len(self.rounds)

    def _finish_sends(self, i: int) -> None:
        for work in self._works.pop(i, ()):
            work.wait()

    def _await(self, peer: int, counter: int, i: int, what: str) -> None:
        """Poll until the peer's counter has passed round i."""
        goal, segment, pause = self._base + i + 1, self._peers[peer], 2e-5
        deadline = time.monotonic() + self.timeout_s
        while segment.get(counter) < goal:
            if time.monotonic() > deadline:
                raise ExchangeError(
                    f"rank {self.rank} waited {self.timeout_s:.0f} s for rank {peer} to {what} round {i} of "
                    f"{len(self.rounds)} of the reshard"
                )
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
