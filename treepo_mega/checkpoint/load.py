"""Megatron's sharded parameters to and from whole HF tensors, in memory.

    fill_local(local_params(chunk), layout, reader)           # HF file -> one chunk of one rank, its slices only

    gather = HfGather(spec, tp=2, pp=2, coords=coords, group=group, dtype=torch.float32)
    for name, tensor in gather(chunks):                       # every rank of the group gets every HF tensor
        ...
    gather.stats                                              # bytes and seconds of the last call

With Megatron's parallel state up, `load_from_hf(models, spec, cfg, hf_dir)` and `HfGather.of(cfg, spec)` fill in
the sizes, ranks and group.

`HfGather` plans once (`gather_plan.py`) and is called for every refit into the engine and for every export. It is
a generator: tensors arrive one by one as soon as they are whole, each freshly allocated on the parameters'
device, and memory stays at a few tensors plus the buffers. `group` holds the TP x PP ranks of one
data-parallel replica and `coords[r]` is group rank r's (tp_rank, pp_rank); with one rank nothing is
communicated.

Traps: the iteration is collective, so every rank of the group must run it to its end. Tensors come in the
plan's order, not the model's. The all-gather moves bytes, because not every backend knows every dtype.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treepo_mega.checkpoint.gather_plan import GatherPlan, Piece, Round, gather_plan
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import NAMING, Box, ModelSpec, Naming, ParamLayout, chunk_layouts, hf_shapes
from treepo_mega.reshard.params import ReshardError, check_params

Reader = Callable[[str, Box], Tensor]


@dataclass(frozen=True, slots=True)
class GatherStats:
    """What one gather cost on this rank. `bytes_hf`: size of the HF tensors. `bytes_received`: what came from the
    other ranks, padding included. `seconds`: wall time inside the gather, without the consumer's."""

    bytes_hf: int
    bytes_received: int
    rounds: int
    seconds: float


def local_params(chunk: nn.Module) -> dict[str, Tensor]:
    """A chunk's parameters by Megatron's names, without the `module.` that wrappers (DDP, Float16Module) prepend."""
    out = {}
    for name, param in chunk.named_parameters():
        while name.startswith("module."):
            name = name.removeprefix("module.")
        out[name] = param.data
    return out


@torch.no_grad()
def fill_local(params: Mapping[str, Tensor], layout: Mapping[str, ParamLayout], reader: HfReader | Reader) -> int:
    """Fill one chunk's parameters in place from HF slices, cast to each parameter's dtype; padding becomes zero.

    `reader` is an HfReader or a function (hf_name, box) -> tensor. Returns the bytes filled.
    Raises ReshardError when the parameters are not those of the map.
    """
    check_params(params, layout)
    read = reader.read if isinstance(reader, HfReader) else reader
    filled = 0
    for name, spec in layout.items():
        param = params[name]
        if sum(b.numel for b in spec.blocks) < param.numel():
            param.zero_()
        for block in spec.blocks:
            param[block.local_index].copy_(read(block.hf_name, block.hf_slice))
            filled += block.numel * param.element_size()
    return filled


def load_from_hf(
    models: Sequence[nn.Module], spec: ModelSpec, cfg: Config, hf_dir: str | Path, *, reader: HfReader | None = None
) -> int:
    """Fill this rank's model chunks from the HF checkpoint in `hf_dir`, reading only its slices. Not collective.

    Needs Megatron's parallel state. Returns the bytes filled. Raises HfCheckpointError for what is wrong on disk,
    ReshardError for a model that is not the map's. `reader`: an open reader to use instead of opening `hf_dir`.
    """
    ps = _parallel_state()
    layouts = chunk_layouts(
        spec,
        **_sizes(cfg),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
    )
    with contextlib.ExitStack() as stack:
        source = reader or stack.enter_context(HfReader(hf_dir, spec))
        pairs = zip(models, layouts, strict=True)
        return sum(fill_local(local_params(model), layout, source) for model, layout in pairs)


def _parallel_state() -> Any:
    """Megatron's parallel_state, imported when asked for: a gather over a plain group needs no Megatron."""
    from megatron.core import parallel_state

    return parallel_state


def _sizes(cfg: Config) -> dict[str, Any]:
    p = cfg.parallel
    return {
        "tp": p.tensor_model_parallel_size,
        "pp": p.pipeline_model_parallel_size,
        "vpp": p.virtual_pipeline_model_parallel_size,
        "divisible_by": cfg.model.make_vocab_size_divisible_by,
        "naming": NAMING[cfg.model.transformer_impl],
    }


def group_coords(group: dist.ProcessGroup | None, tp_rank: int, pp_rank: int) -> list[tuple[int, int]]:
    """(tp_rank, pp_rank) of every rank of `group`, in group order. Collective, CPU tensors; one rank: no collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [(tp_rank, pp_rank)]
    parts = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, torch.tensor([tp_rank, pp_rank]), group=group)
    return [(int(t), int(p)) for t, p in parts]


class HfGather:
    """Gathers whole HF tensors from the shards of one model-parallel replica; see the module's page.

    `dtype` is that of the parameters and of the result. `bucket_mib` bounds what one rank sends at a time, in MiB;
    the receiving buffer is len(coords) times as large. Raises ReshardError when `coords` is not each (tp, pp)
    exactly once, or `group` has another size.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        tp: int,
        pp: int,
        vpp: int | None = 1,
        divisible_by: int = 128,
        naming: Naming = "local",
        coords: Sequence[tuple[int, int]],
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype,
        bucket_mib: float = 64,
    ) -> None:
        if sorted(coords) != sorted((t, p) for t in range(tp) for p in range(pp)):
            raise ReshardError(f"coords {list(coords)}: expected every (tp_rank, pp_rank) of TP {tp} x PP {pp} once")
        self.world = len(coords)
        if self.world > 1 and dist.get_world_size(group) != self.world:
            raise ReshardError(f"the group has {dist.get_world_size(group)} ranks; expected TP {tp} x PP {pp}")
        self.rank = dist.get_rank(group) if self.world > 1 else 0
        self.stats = GatherStats(0, 0, 0, 0.0)
        self._group, self._dtype = group, dtype
        self._shapes = hf_shapes(spec)
        layouts = [
            chunk_layouts(spec, tp=tp, pp=pp, vpp=vpp, tp_rank=t, pp_rank=p, divisible_by=divisible_by, naming=naming)
            for t, p in coords
        ]
        self._mine = layouts[self.rank]
        self.plan: GatherPlan = gather_plan(layouts, max(1, int(bucket_mib * 2**20) // dtype.itemsize))

    @classmethod
    def of(cls, cfg: Config, spec: ModelSpec, *, dtype: torch.dtype, bucket_mib: float = 64) -> HfGather:
        """For this rank's data-parallel replica under Megatron's parallel state. Collective over all ranks."""
        ps = _parallel_state()
        group = ps.get_model_parallel_group()
        coords = group_coords(group, ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank())
        return cls(spec, **_sizes(cfg), coords=coords, group=group, dtype=dtype, bucket_mib=bucket_mib)

    @torch.no_grad()
    def __call__(self, chunks: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield (hf_name, tensor) for every HF tensor. `chunks`: `local_params` of this rank's chunks, in order."""
        self._check(chunks)
        device = next(iter(chunks[0].values())).device
        send = torch.zeros(self.plan.length, dtype=self._dtype, device=device)
        received = send.new_zeros(self.world, self.plan.length) if self.world > 1 else send[None]
        open_tensors: dict[str, Tensor] = {}
        seconds, started = 0.0, time.perf_counter()
        for step in self.plan.rounds:
            rows = self._exchange(chunks, step, send, received)
            for row, pieces in zip(rows, step.sends, strict=True):
                self._scatter(row, pieces, open_tensors)
            for name in step.complete:
                tensor = open_tensors.pop(name)
                seconds += time.perf_counter() - started
                yield name, tensor
                started = time.perf_counter()
        self.stats = GatherStats(
            bytes_hf=self.plan.elements * self._dtype.itemsize,
            bytes_received=(self.world - 1) * sum(r.length for r in self.plan.rounds) * self._dtype.itemsize,
            rounds=len(self.plan.rounds),
            seconds=seconds + time.perf_counter() - started,
        )

    def _check(self, chunks: Sequence[Mapping[str, Tensor]]) -> None:
        if len(chunks) != len(self._mine):
            raise ReshardError(f"{len(chunks)} model chunks; expected {len(self._mine)}")
        for params, layout in zip(chunks, self._mine, strict=True):
            check_params(params, layout)
            for name, value in params.items():
                if value.dtype != self._dtype:
                    raise ReshardError(f"parameter {name} has dtype {value.dtype}; expected {self._dtype}")

    def _exchange(self, chunks: Sequence[Mapping[str, Tensor]], step: Round, send: Tensor, received: Tensor) -> Tensor:
        """Pack this rank's pieces into `send` and all-gather; returns [world, step.length]."""
        at = 0
        for piece in step.sends[self.rank]:
            block = piece.block
            send[at : at + block.numel].view(block.shape).copy_(chunks[piece.chunk][piece.param][block.local_index])
            at += block.numel
        if self.world == 1:
            return received[:, : step.length]
        out = received.view(-1)[: self.world * step.length]
        dist.all_gather_single(out.view(torch.uint8), send[: step.length].view(torch.uint8), group=self._group)
        return out.view(self.world, step.length)

    def _scatter(self, row: Tensor, pieces: Sequence[Piece], open_tensors: dict[str, Tensor]) -> None:
        at = 0
        for piece in pieces:
            block = piece.block
            if block.hf_name not in open_tensors:
                open_tensors[block.hf_name] = row.new_empty(self._shapes[block.hf_name])
            open_tensors[block.hf_name][block.hf_index].copy_(row[at : at + block.numel].view(block.shape))
            at += block.numel
