"""The two sides of a reshard: which rank holds, or wants, which part of the HF tensors. Pure.

    trainer = mcore_side(spec, Grid(tp=8, pp=4), world_size=128)
    engines = vllm_side(spec, tp=8, world_size=128)
    files = files_side(spec, world_size=128)          # whole tensors, each on one rank, spread by bytes

A `Side` has one layout per *coordinate* and the coordinate of every rank: thousands of ranks share few layouts, and
the planner works on coordinates. Chunks of a rank (virtual pipeline stages) are told apart by a number.

Ranks are ordered as Megatron orders them (tp fastest, then cp and dp, then pp). Experts divide the ranks of a stage
anew: expert-tensor-parallel rank fastest, then expert-parallel rank. An engine's ranks are contiguous, as vLLM's
external launcher wants them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod

import numpy as np
from numpy.typing import NDArray

from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import (
    NAMING,
    Block,
    LayoutError,
    ModelSpec,
    Naming,
    ParamLayout,
    chunk_layouts,
    hf_shapes,
)
from treepo_mega.modelspec.vllm_layout import vllm_layout
from treepo_mega.runtime.balance import balance

ChunkLayouts = Sequence[Mapping[str, ParamLayout]]
"""Layouts of one rank's model chunks."""

Ranks = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid:
    """Megatron's parallel sizes; data (and context) parallelism is what is left of the world."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    divisible_by: int = 128
    naming: Naming = "local"
    etp: int | None = None
    """Ranks that share each matrix of an expert; None: as tp."""

    @property
    def period(self) -> int:
        """Ranks of a stage after which coordinates repeat: those that hold different parameters."""
        return lcm(self.tp, (self.etp or self.tp) * self.ep)

    def replicas(self, world_size: int) -> int:
        """Data-parallel times context-parallel size. Raises LayoutError when the world does not fit."""
        if world_size % (self.tp * self.pp):
            raise LayoutError(f"world size {world_size} is not a multiple of TP {self.tp} x PP {self.pp}")
        if world_size // self.pp % self.period:
            etp = self.etp or self.tp
            raise LayoutError(
                f"{world_size // self.pp} ranks of a stage (world size {world_size} / PP {self.pp}) are not a multiple "
                f"of expert-tensor-parallel size {etp} x EP {self.ep} and of TP {self.tp}"
            )
        return world_size // (self.tp * self.pp)


def grid_of(cfg: Config) -> Grid:
    """Megatron's parallel sizes in a configuration."""
    parallel = cfg.parallel
    return Grid(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.virtual_pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        divisible_by=cfg.model.make_vocab_size_divisible_by,
        naming=NAMING[cfg.model.transformer_impl],
    )


@dataclass(frozen=True, slots=True)
class Side:
    """`layouts[c]` is what a rank of coordinate c holds; `of_rank` [world_size] is each rank's coordinate, -1: none."""

    layouts: tuple[ChunkLayouts, ...]
    of_rank: Ranks

    def of(self, rank: int) -> ChunkLayouts:
        """Chunk layouts of a rank."""
        return self.layouts[self.of_rank[rank]] if self.of_rank[rank] >= 0 else ()


def mcore_side(spec: ModelSpec, grid: Grid, world_size: int) -> Side:
    """Megatron's shards; coordinate pp_rank * period + a rank's place in its stage, modulo the period.

    Raises LayoutError for impossible sizes.
    """
    replicas = grid.replicas(world_size)
    period = grid.period
    etp = grid.etp or grid.tp
    layouts = [
        chunk_layouts(
            spec,
            tp=grid.tp,
            pp=grid.pp,
            vpp=grid.vpp,
            tp_rank=place % grid.tp,
            pp_rank=pp_rank,
            divisible_by=grid.divisible_by,
            ep=grid.ep,
            ep_rank=place // etp % grid.ep,
            etp=etp,
            etp_rank=place % etp,
            naming=grid.naming,
        )
        for pp_rank in range(grid.pp)
        for place in range(period)
    ]
    ranks = np.arange(world_size)
    # Megatron's order of ranks: stages are slowest.
    size = grid.tp * replicas
    return Side(tuple(layouts), ranks // size * period + ranks % size % period)


def vllm_side(spec: ModelSpec, tp: int, world_size: int, *, expert_parallel: bool = False) -> Side:
    """Workers of vLLM engines over `tp` ranks each; coordinate tp_rank. Raises LayoutError for impossible sizes.

    `expert_parallel`: each of them holds whole experts.
    """
    if world_size % tp:
        raise LayoutError(f"world size {world_size} is not a multiple of the engine's tensor-parallel size {tp}")
    layouts = tuple([vllm_layout(spec, tp, tp_rank, expert_parallel=expert_parallel)] for tp_rank in range(tp))
    return Side(layouts, np.arange(world_size) % tp)


def engine_side(cfg: Config, spec: ModelSpec, world_size: int) -> Side:
    """The engines of a configuration. Raises LayoutError for impossible sizes."""
    engine = cfg.rollout.engine
    expert_parallel = engine.enable_expert_parallel
    return vllm_side(spec, engine.tensor_parallel_size, world_size, expert_parallel=expert_parallel)


def files_side(spec: ModelSpec, world_size: int, writers: int | None = None) -> Side:
    """Whole HF tensors, each wanted by one of the first `writers` ranks (None: all), about the same bytes for each.

    Coordinate = rank. The tensors of a rank keep the model's order.
    """
    shapes = hf_shapes(spec)
    names = list(shapes)
    layouts: list[dict[str, ParamLayout]] = [{} for _ in range(world_size)]
    for rank, indices in enumerate(balance([prod(shape) for shape in shapes.values()], writers or world_size)):
        for index in indices:
            name = names[index]
            shape = shapes[name]
            box = tuple((0, size) for size in shape)
            layouts[rank][name] = ParamLayout(shape, (Block(name, box, box),))
    return Side(tuple([layout] for layout in layouts), np.arange(world_size))
