"""Carries a plan out: pack, send, place; two rounds in flight; each parameter is handed over as soon as it is whole.

    resharder = Resharder.between(source, target, source_dtype=..., target_dtype=..., bucket_bytes=..., timeout_s=...)
    stats = resharder(chunks, TensorTarget(wanted))          # collective over all ranks, any number of times

README.md beside this file has the picture, and an example that is run as a test.

A `Target` owns the destination. Its phases are those of vLLM's weight transfer: `start_weight_update`, then for each
parameter `buffer` (where to write) and `update_weight` (it is whole), and `finish_weight_update`. After a failure
comes `abort_weight_update`.

Sources are only read. While the parcels of a round are on their way, a rank copies what it holds itself and unpacks
the round before. With `checksums=True` every HF tensor is summed at both ends (`checksums.py`).
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from treepo_mega.modelspec.mcore_layout import Block, Box
from treepo_mega.reshard.checksums import Checksums
from treepo_mega.reshard.params import Chunks, check_chunks
from treepo_mega.reshard.plan import Cluster, Copy, ReshardPlan, plan_reshard
from treepo_mega.reshard.sides import ChunkLayouts, Side
from treepo_mega.reshard.transport.pairs import TransportByPair
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import device as device_of_this_rank

Destination = tuple[int, str]
"""(chunk, parameter name) of a destination."""


class Target(Protocol):
    """A destination; see the module's page."""

    def start_weight_update(self) -> None:
        """Weights are about to change."""

    def buffer(self, chunk: int, name: str) -> Tensor:
        """Where this parameter's elements go: its local shape, any float dtype, padding already zero."""

    def update_weight(self, chunk: int, name: str) -> None:
        """Every element of this parameter has been written."""

    def finish_weight_update(self) -> None:
        """All parameters have been handed over."""

    def abort_weight_update(self) -> None:
        """The update failed half way."""


class TensorTarget:
    """Plain tensors as a destination: `params[chunk][name]` is written in place."""

    def __init__(self, params: Chunks) -> None:
        self.params = params

    def start_weight_update(self) -> None:
        """Nothing to do."""

    def buffer(self, chunk: int, name: str) -> Tensor:
        """The tensor itself."""
        return self.params[chunk][name]

    def update_weight(self, chunk: int, name: str) -> None:
        """Nothing to do."""

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def abort_weight_update(self) -> None:
        """Nothing to do: what was written stays."""


@dataclass(slots=True)
class ReshardStats:
    """What one call cost on this rank. Bytes on the way; seconds of wall time.

    `handed_over_seconds` is the target's own work (packing, quantising); `seconds` is everything else. `checksums`:
    HF tensor -> (sum over what its sources held, sum over what arrived here), when asked for.
    """

    bytes_received: int = 0
    bytes_local: int = 0
    seconds: float = 0.0
    handed_over_seconds: float = 0.0
    checksums: dict[str, tuple[int, int]] = field(default_factory=dict)


class Resharder:
    """Runs `plan` on this rank, any number of times. `between` makes the plan too. Building is collective.

    `source_dtype`: of every source parameter. `wire_dtype`: on the way. `shared_memory`: as in `TransportByPair`.
    Raises RuntimeError when the ranks do not have the same plan.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        source: Side,
        target: Side,
        rank: int,
        *,
        source_dtype: torch.dtype,
        wire_dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
        shared_memory: bool | None = None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.source_dtype = source_dtype
        self.wire_dtype = wire_dtype
        if len(set(dist.gather_objects(plan.digest))) > 1:
            raise RuntimeError("the ranks planned different reshards: their configurations or node sizes differ")
        self.rounds = plan.for_rank(rank)
        self._connect = functools.partial(
            TransportByPair,
            self.rounds,
            rank,
            plan.cluster,
            dtype=wire_dtype,
            device=device,
            timeout_s=timeout_s,
            shared_memory=shared_memory,
        )
        self.transport = self._connect()
        self._broken = False
        self.source_layouts = source.of(rank)
        self.target_layouts = target.of(rank)
        self.places = _places(self.source_layouts)
        self.copies_of: Counter[Destination] = Counter()
        for each in self.rounds:
            for copy in [*each.local, *(copy for parcel in each.receives for copy in parcel.copies)]:
                self.copies_of[copy.chunk, copy.param] += 1
        self.only_padding: list[Destination] = [
            (chunk, name)
            for chunk, params in enumerate(self.target_layouts)
            for name, param in params.items()
            if not any(block.numel for block in param.blocks)
        ]

    @classmethod
    def between(
        cls,
        source: Side,
        target: Side,
        *,
        source_dtype: torch.dtype,
        target_dtype: torch.dtype,
        bucket_bytes: int,
        timeout_s: float,
        cluster: Cluster | None = None,
        device: torch.device | None = None,
        shared_memory: bool | None = None,
    ) -> Resharder:
        """Plan and connect. Collective over all ranks.

        `cluster` None: the ranks of this job. `device` None: that of this rank. Values travel in the narrower of both
        dtypes. Raises PlanError when no plan exists.
        """
        # A cast happens where it saves bytes: before the way if the target is narrower, after it otherwise.
        wire_dtype = min(source_dtype, target_dtype, key=lambda dtype: dtype.itemsize)
        plan = plan_reshard(
            source,
            target,
            cluster or Cluster(dist.world_size(), dist.ranks_per_node()),
            itemsize=wire_dtype.itemsize,
            bucket_bytes=bucket_bytes,
        )
        return cls(
            plan,
            source,
            target,
            dist.rank(),
            source_dtype=source_dtype,
            wire_dtype=wire_dtype,
            device=device or device_of_this_rank(),
            timeout_s=timeout_s,
            shared_memory=shared_memory,
        )

    @torch.no_grad()
    def __call__(self, chunks: Chunks, target: Target, *, checksums: bool = False) -> ReshardStats:
        """Move `chunks` (this rank's source parameters) into `target`. Collective over all ranks.

        Raises ReshardError when `chunks` are not those of the map, before anything moves, and TransportError at a
        deadline. Whatever goes wrong, the target's `abort_weight_update` is called first, and the next call starts
        from new buffers (one rank's failure ends the call on all of them).
        """
        check_chunks(chunks, self.source_layouts, self.source_dtype)
        if self._broken:
            # After a failure, the ranks' counters may stand at different rounds: the old transport is not used again.
            self.transport = self._connect()
            self._broken = False
        transfer = _Transfer(self, chunks, target, Checksums() if checksums else None)
        try:
            transfer.run()
        # KeyboardInterrupt too: modules that are half filled must get their old storage back.
        except BaseException:
            self._broken = True
            target.abort_weight_update()
            raise
        return transfer.stats


def _places(layouts: ChunkLayouts) -> dict[tuple[str, Box], tuple[int, str, Block]]:
    """(HF tensor, box) -> (chunk, parameter, block) that holds it on this rank."""
    places: dict[tuple[str, Box], tuple[int, str, Block]] = {}
    for chunk, params in enumerate(layouts):
        for name, param in params.items():
            for block in param.blocks:
                places[block.hf_name, block.hf_slice] = (chunk, name, block)
    return places


class _Transfer:
    """One call: counts how many copies each destination still lacks."""

    def __init__(self, resharder: Resharder, chunks: Chunks, target: Target, checksums: Checksums | None) -> None:
        self.resharder = resharder
        self.transport = resharder.transport
        self.chunks = chunks
        self.target = target
        self.checksums = checksums
        self.lacking = dict(resharder.copies_of)
        self.stats = ReshardStats()

    def run(self) -> None:
        """Send round n while round n - 1 is received and placed. Raises RuntimeError when something is not whole."""
        started = time.perf_counter()
        rounds = self.resharder.rounds
        for number in range(len(rounds) + 1):
            if number < len(rounds):
                self._send(number)
            if number == 0:
                # Only now: an engine's wake-up overlaps with the first parcels on their way.
                self._timed(self.target.start_weight_update)
                self._hand_over_padding()
            if number < len(rounds):
                self._copy_local(rounds[number].local)
            if number:
                self._receive(number - 1)
        self.transport.end()
        if unfinished := [name for (_, name), copies in self.lacking.items() if copies]:
            raise RuntimeError(f"the plan ended, but {unfinished[0]} is not whole")
        self._timed(self.target.finish_weight_update)
        self.stats.seconds = time.perf_counter() - started - self.stats.handed_over_seconds
        if self.checksums:
            self.stats.checksums = self.checksums.gather(self.resharder.rank)

    def _send(self, number: int) -> None:
        """Pack what others want of this rank in a round, and start the round."""
        buffer = self.transport.send_buffer(number)
        plan = self.resharder.rounds[number]
        for parcel in plan.sends:
            offset = parcel.offset
            for copy in parcel.copies:
                values = self._source_values(copy)
                buffer[offset : offset + copy.numel].view(copy.shape).copy_(values)
                offset += copy.numel
                if self.checksums:
                    self.checksums.add_source(copy, values.to(self.resharder.wire_dtype), parcel.targets)
        for parcel in plan.receives:
            self.transport.submit_recv(number, parcel)
        for parcel in plan.sends:
            for target in parcel.targets:
                self.transport.submit_send(number, parcel, target)
        self.transport.run(number)

    def _hand_over_padding(self) -> None:
        """Parameters without a single element of the model: a small vocabulary leaves nothing for the last ranks."""
        for destination in self.resharder.only_padding:
            # Nothing is written, but asking for the buffer makes the target zero its padding.
            self.target.buffer(*destination)
            self._timed(self.target.update_weight, *destination)

    def _copy_local(self, copies: Sequence[Copy]) -> None:
        """Place what this rank holds itself."""
        for copy in copies:
            values = self._source_values(copy)
            self._place(copy, values)
            self.stats.bytes_local += copy.numel * self.resharder.wire_dtype.itemsize
            if self.checksums:
                self.checksums.add_source(copy, values.to(self.resharder.wire_dtype), (self.resharder.rank,))
        self._hand_over_whole(copies)

    def _receive(self, number: int) -> None:
        """Place what others sent in a round."""
        placed: list[Copy] = []
        for parcel, values in self.transport.received(number):
            offset = 0
            for copy in parcel.copies:
                self._place(copy, values[offset : offset + copy.numel].view(copy.shape))
                offset += copy.numel
            self.stats.bytes_received += offset * self.resharder.wire_dtype.itemsize
            placed += parcel.copies
        # Released before the target packs or quantises: its work must not hold up the sources.
        self.transport.release(number)
        self._hand_over_whole(placed)

    def _source_values(self, copy: Copy) -> Tensor:
        """The elements of `copy` in this rank's parameters, a view."""
        chunk, name, block = self.resharder.places[copy.hf_name, copy.held]
        index = []
        for (start, stop), (held_from, _), (local_from, _) in zip(
            copy.box, block.hf_slice, block.local_slice, strict=True
        ):
            shift = local_from - held_from
            index.append(slice(start + shift, stop + shift))
        return self.chunks[chunk][name][tuple(index)]

    def _place(self, copy: Copy, values: Tensor) -> None:
        """Write the elements of `copy` where they belong, cast to the destination's dtype."""
        index = tuple(slice(start, stop) for start, stop in copy.target_box)
        into = self.target.buffer(copy.chunk, copy.param)[index]
        # A stacked destination (experts) has one dimension more, of size 1 here.
        into.view(values.shape if into.dim() == values.dim() else into.shape[1:]).copy_(values)

    def _hand_over_whole(self, placed: Sequence[Copy]) -> None:
        """Count what was placed, and tell the target which parameters it has made whole."""
        for copy in placed:
            destination = (copy.chunk, copy.param)
            self.lacking[destination] -= 1
            if not self.lacking[destination]:
                # Summed before the hand-over: packing or quantising replaces these bytes.
                if self.checksums:
                    layout = self.resharder.target_layouts[copy.chunk][copy.param]
                    self.checksums.add_target(layout, self.target.buffer(*destination), self.resharder.wire_dtype)
                self._timed(self.target.update_weight, *destination)

    def _timed(self, work: Callable[..., None], *args: Any) -> None:
        started = time.perf_counter()
        work(*args)
        self.stats.handed_over_seconds += time.perf_counter() - started
