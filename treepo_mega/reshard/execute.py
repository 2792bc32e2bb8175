"""Carries a plan out: pack, exchange, place; two rounds in flight; each parameter handed over when it is whole.

    resharder = Resharder(plan, source_side, rank, dtype=torch.bfloat16, timeout_s=600)
    stats = resharder([local_params(m) for m in models], target)      # collective over all ranks

A `Target` owns the destination. Its phases are those of vLLM's weight transfer: `init_weight_transfer` (once, by
its owner), `start_weight_update`, then for each parameter `buffer` (where to write) and `update_weight` (it is
whole), and `finish_weight_update`; `abort_weight_update` after a failure. `TensorTarget` is a dict of tensors.

Round by round a rank packs what others want of it, casting to the narrower of both sides' dtypes; while those parcels
are on their way it copies what it already holds, and unpacks the round before. The first round is packed and
posted before the target starts, so that an engine's wake-up overlaps with it. Sources are only read.

With `checksums=True` every HF tensor gets a checksum of its bits, weighted by their place in the tensor: as the sources
hold it, and as it lies in the destination when it is handed over. `differing_groups` tells what differs.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from treepo_mega.modelspec.mcore_layout import Block, Box, ParamLayout
from treepo_mega.reshard.plan import Copy, ReshardPlan
from treepo_mega.reshard.sides import Side
from treepo_mega.reshard.transport.exchange import Exchange
from treepo_mega.runtime import dist

Chunks = Sequence[Mapping[str, Tensor]]
"""A rank's parameters by name, one mapping per model chunk."""

Key = tuple[int, str]
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
    HF tensor -> (sum over what its sources held, sum over what lies here), when asked for.
    """

    bytes_received: int = 0
    bytes_local: int = 0
    seconds: float = 0.0
    handed_over_seconds: float = 0.0
    checksums: dict[str, tuple[int, int]] = field(default_factory=dict)


class Resharder:
    """Runs `plan` on this rank, any number of times. Building is collective over all ranks.

    `dtype` is that on the way. Raises RuntimeError when the ranks do not have the same plan.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        source: Side,
        target: Side,
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
        shared_memory: bool | None = None,
    ) -> None:
        self.plan, self.rank, self.dtype = plan, rank, dtype
        if len(set(dist.gather_objects(plan.digest))) > 1:
            raise RuntimeError("the ranks planned different reshards: their configurations or node sizes differ")
        self.rounds = plan.for_rank(rank)
        self._connect = functools.partial(
            Exchange,
            self.rounds,
            rank,
            plan.cluster,
            dtype=dtype,
            device=device,
            timeout_s=timeout_s,
            shared_memory=shared_memory,
        )
        self.exchange = self._connect()
        self._broken = False
        self.wanted = target.of(rank)
        self.held: dict[tuple[str, Box], tuple[int, str, Block]] = {}
        for chunk, params in enumerate(source.of(rank)):
            for name, param in params.items():
                for block in param.blocks:
                    self.held[block.hf_name, block.hf_slice] = (chunk, name, block)
        self.copies: Counter[Key] = Counter()
        for r in self.rounds:
            for copy in [*r.local, *(c for p in r.receives for c in p.copies)]:
                self.copies[copy.chunk, copy.param] += 1
        self.all_padding = [
            (chunk, name)
            for chunk, params in enumerate(self.wanted)
            for name, param in params.items()
            if not any(b.numel for b in param.blocks)
        ]

    @torch.no_grad()
    def __call__(self, chunks: Chunks, target: Target, *, checksums: bool = False) -> ReshardStats:
        """Move `chunks` (this rank's source parameters) into `target`. Collective over all ranks.

        Raises ExchangeError at a deadline; whatever goes wrong, the target's `abort_weight_update` is called first,
        and the next call starts from new buffers (one rank's failure ends the call on all of them).
        """
        if self._broken:
            self.exchange, self._broken = self._connect(), False
        run = _Run(self, chunks, target, _Checksums() if checksums else None)
        try:
            run.all_rounds()
        except BaseException:
            self._broken = True
            target.abort_weight_update()
            raise
        return run.stats


class _Run:
    """One execution: counts what each destination still lacks."""

    def __init__(self, of: Resharder, chunks: Chunks, target: Target, sums: _Checksums | None) -> None:
        self.of, self.chunks, self.target, self.sums = of, chunks, target, sums
        self.left = dict(of.copies)
        self.stats = ReshardStats()

    def all_rounds(self) -> None:
        """Send round i while round i - 1 is received and placed. Raises RuntimeError when something is not whole."""
        started, rounds = time.perf_counter(), self.of.rounds
        for i in range(len(rounds) + 1):
            if i < len(rounds):
                self._send(i)
            if i == 0:
                self._timed(self.target.start_weight_update)
                for key in self.of.all_padding:  # a small vocabulary leaves nothing for the last ranks
                    self.target.buffer(*key)
                    self._timed(self.target.update_weight, *key)
            if i < len(rounds):
                self._copy_local(rounds[i].local)
            if i:
                self._receive(i - 1)
        self.of.exchange.end()
        if unfinished := [key for key, n in self.left.items() if n]:
            raise RuntimeError(f"the plan ended, but {unfinished[0][1]} is not whole")
        self._timed(self.target.finish_weight_update)
        self.stats.seconds = time.perf_counter() - started - self.stats.handed_over_seconds
        if self.sums:
            self.stats.checksums = self.sums.gather(self.of.rank)

    def _send(self, i: int) -> None:
        """Pack what others want in round i, and let it go."""
        buffer = self.of.exchange.free(i)
        for parcel in self.of.rounds[i].sends:
            at = parcel.offset
            for copy in parcel.copies:
                values = self._held(copy)
                buffer[at : at + copy.numel].view(copy.shape).copy_(values)
                at += copy.numel
                if self.sums:
                    self.sums.add_source(copy, values.to(self.of.dtype), parcel.targets)
        self.of.exchange.post(i)

    def _copy_local(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            values = self._held(copy)
            self._write(copy, values)
            self.stats.bytes_local += copy.numel * self.of.dtype.itemsize
            if self.sums:
                self.sums.add_source(copy, values.to(self.of.dtype), (self.of.rank,))
        self._count(copies)

    def _receive(self, i: int) -> None:
        """Unpack round i and acknowledge it; only then does the target work on what has become whole."""
        done: list[Copy] = []
        for parcel, values in self.of.exchange.arrived(i):
            at = 0
            for copy in parcel.copies:
                self._write(copy, values[at : at + copy.numel].view(copy.shape))
                at += copy.numel
            self.stats.bytes_received += at * self.of.dtype.itemsize
            done += parcel.copies
        self.of.exchange.release(i)
        self._count(done)

    def _held(self, copy: Copy) -> Tensor:
        """The elements of `copy` in this rank's parameters, a view."""
        chunk, name, block = self.of.held[copy.hf_name, copy.held]
        boxes = zip(copy.box, block.hf_slice, block.local_slice, strict=True)
        return self.chunks[chunk][name][tuple(slice(a - h + t, b - h + t) for (a, b), (h, _), (t, _) in boxes)]

    def _write(self, copy: Copy, values: Tensor) -> None:
        into = self.target.buffer(copy.chunk, copy.param)[tuple(slice(a, b) for a, b in copy.target_box)]
        into.view(values.shape if into.dim() == values.dim() else into.shape[1:]).copy_(values)

    def _count(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            key = (copy.chunk, copy.param)
            self.left[key] -= 1
            if not self.left[key]:
                if self.sums:
                    layout = self.of.wanted[copy.chunk][copy.param]
                    self.sums.add_target(layout, self.target.buffer(*key), self.of.dtype)
                self._timed(self.target.update_weight, *key)

    def _timed(self, work: Callable[..., None], *args: Any) -> None:
        started = time.perf_counter()
        work(*args)
        self.stats.handed_over_seconds += time.perf_counter() - started


class _Checksums:
    """Sums of the bits of every HF tensor, weighted by place, at both ends. Additive over boxes, modulo 2^64."""

    def __init__(self) -> None:
        self.sent: dict[int, Counter[str]] = {}
        self.lies: Counter[str] = Counter()

    def add_source(self, copy: Copy, values: Tensor, targets: Sequence[int]) -> None:
        """What this rank holds of `copy`, on its way to `targets`."""
        for target in targets:
            self.sent.setdefault(target, Counter())[copy.hf_name] += checksum(values, copy.box)

    def add_target(self, layout: ParamLayout, value: Tensor, dtype: torch.dtype) -> None:
        """What lies in a destination parameter."""
        for block in layout.blocks:
            part = value[block.local_index].reshape(block.shape).to(dtype)
            self.lies[block.hf_name] += checksum(part, block.hf_slice)

    def gather(self, rank: int) -> dict[str, tuple[int, int]]:
        """HF tensor -> (as its sources hold it, as it lies here). Collective over all ranks."""
        wanted: Counter[str] = Counter()
        for told in dist.gather_objects({str(t): dict(sums) for t, sums in self.sent.items()}):
            wanted.update(told.get(str(rank), {}))
        return {name: (wanted[name] % 2**64, self.lies[name] % 2**64) for name in sorted({*wanted, *self.lies})}


def checksum(values: Tensor, box: Box) -> int:
    """Sum over the elements of `box` of (bits as an integer) x (a weight of the place in the HF tensor)."""
    bits = values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    weights = torch.ones((), dtype=torch.int64, device=values.device)
    for (a, b), prime in zip(box, (7919, 104729, 1299709), strict=False):
        weights = weights.unsqueeze(-1) * 31 + (torch.arange(a, b, device=values.device) * prime + 1) % 65521
    return int((bits.to(torch.int64) * weights).sum())


def differing_groups(checksums: Mapping[str, tuple[int, int]]) -> list[str]:
    """Layer groups (`model.layers.3`, or the tensor itself outside layers) with a tensor whose checksums differ."""
    groups = []
    for name, (held, lies) in checksums.items():
        if held != lies:
            parts = name.split(".")
            groups.append(".".join(parts[:3]) if parts[1:2] == ["layers"] else name)
    return list(dict.fromkeys(groups))
