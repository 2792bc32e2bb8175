"""Where a rank stands in a layout, and the bytes that it always holds, as Megatron lays them out. Pure.

    layout = Layout.of(cfg, world_size=128)
    held = held_bytes(cfg, spec, layout, layout.place(rank=0))
    held.parameters, held.gradients, held.optimizer

Megatron pads parameters to 64 elements and buckets to the data-parallel size, and each data-parallel rank keeps its
share of every bucket. `treepo-mega plan --prove` builds the same with fake tensors, and finds the same bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from treepo_mega.config import Config, data_parallel_size
from treepo_mega.modelspec.mcore_layout import NAMING, Naming, chunk_layouts
from treepo_mega.modelspec.spec import ModelSpec

ITEMSIZE = {"fp32": 4, "bf16": 2}
PARAMETER_ALIGNED = 64
BUCKET_ALIGNED = 128
# In the order of Megatron's modules, by which it fills its buffers.
_ORDER = (
    "embedding", "input_layernorm", "linear_proj", "linear_qkv.layer_norm", "linear_qkv.weight", "linear_qkv.bias",
    "q_layernorm", "k_layernorm", "pre_mlp_layernorm", "router", "linear_fc1.layer_norm", "linear_fc1", "linear_fc2",
    "final_layernorm", "output_layer",
)  # fmt: skip


EXPERT = ".experts."
"""In the names of routed experts' parameters."""
SHARED = ".shared_experts."
_OF_SHARED = ("shared_experts", "linear_fc1", "linear_fc2")
"""What stands before the last word of a shared expert's parameters: first its gate, which is a parameter of its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinates; `shard`: its number among the ranks that share optimizer state (CP x DP).

    `ep_rank`, `etp_rank` and `expert_shard`: whose experts it holds, which part of each, and its number among the ranks
    that hold the same.
    """

    stage: int
    tp_rank: int
    shard: int
    ep_rank: int = 0
    etp_rank: int = 0
    expert_shard: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the groups, in ranks. vpp 1: one chunk a stage. etp None: an expert is split over TP as others are."""

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    tp_v: int
    ep: int = 1
    etp: int | None = None

    @classmethod
    def of(cls, cfg: Config, world_size: int) -> Layout:
        """Of `cfg` on so many ranks. Raises ConfigError when they are no whole number of models."""
        parallel = cfg.parallel
        return cls(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size or 1,
            parallel.context_parallel_size,
            data_parallel_size(cfg, world_size),
            cfg.rollout.engine.tensor_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.expert_tensor_parallel_size,
        )

    @property
    def expert_tp(self) -> int:
        """Ranks that share each matrix of an expert."""
        return self.etp or self.tp

    @property
    def expert_replicas(self) -> int:
        """Ranks of a stage that hold the same of the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.expert_tp)

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def title(self) -> str:
        """For people."""
        virtual = f" x VPP {self.vpp}" if self.vpp > 1 else ""
        context = f" x CP {self.cp}" if self.cp > 1 else ""
        split = f" x ETP {self.expert_tp}" if self.expert_tp != self.tp else ""
        experts = f", EP {self.ep}{split}" if self.ep > 1 else ""
        return f"TP {self.tp} x PP {self.pp}{virtual}{context} x DP {self.dp}{experts}, TP_v {self.tp_v}"

    def place(self, rank: int) -> Place:
        """Where a global rank stands: Megatron counts TP first, then CP, DP and PP; of experts ETP, then EP."""
        stage, inside = divmod(rank, self.tp * self.cp * self.dp)
        of_experts, etp_rank = divmod(inside, self.expert_tp)
        expert_shard, ep_rank = divmod(of_experts, self.ep)
        return Place(stage, inside % self.tp, inside // self.tp, ep_rank, etp_rank, expert_shard)

    def first_rank(self, stage: int) -> int:
        """The lowest global rank of a pipeline stage."""
        return stage * self.tp * self.cp * self.dp


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that a rank holds between passes."""

    parameters: int
    gradients: int
    optimizer: int
    """fp32 main parameters (bf16 alone has them) and both moments."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class _Parameter:
    numel: int
    own_bucket: bool
    apart: bool
    """An expert that not all ranks of a stage hold: in a buffer of its own."""


@functools.lru_cache(maxsize=4096)
def _parameters(
    spec: ModelSpec, layout: Layout, place: Place, divisible_by: int, naming: Naming
) -> tuple[tuple[_Parameter, ...], ...]:
    """Of every chunk of a rank, in the order of Megatron's modules."""
    # Replicas do not matter here, and are left out: a search asks for few different ones.
    chunks = chunk_layouts(
        spec,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        tp_rank=place.tp_rank,
        pp_rank=place.stage,
        divisible_by=divisible_by,
        ep=layout.ep,
        ep_rank=place.ep_rank,
        etp=layout.expert_tp,
        etp_rank=place.etp_rank,
        naming=naming,
    )
    # A tied matrix that lives on two stages is in a bucket of its own on both, so that they share it alike.
    shared = spec.tie_word_embeddings and layout.pp > 1
    return tuple(
        tuple(
            _Parameter(
                math.prod(chunk[name].shape),
                shared and name.startswith(("embedding", "output_layer")),
                EXPERT in name and layout.ep > 1,
            )
            for name in sorted(chunk, key=_order)
        )
        for chunk in chunks
    )


def _order(name: str) -> tuple[int, ...]:
    words = name.split(".")
    if SHARED in name:
        return (1, int(words[2]), _ORDER.index("linear_fc2") + 1, _OF_SHARED.index(words[-2]))
    kind = next(index for index, part in enumerate(_ORDER) if part in name)
    if words[1] != "layers":
        return (0 if kind == 0 else 2, 0, kind)
    if EXPERT not in name:
        return (1, int(words[2]), kind)
    # Whole experts one after the other, or the first matrices of all before their second ones.
    first = _ORDER.index("linear_fc1")
    if "local_experts" in words:
        return (1, int(words[2]), first, int(words[words.index("local_experts") + 1]), kind)
    return (1, int(words[2]), first, kind, int(words[-1].removeprefix("weight")))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _buckets(
    parameters: Sequence[_Parameter], limit: float, shards: int
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(start, end, [start and end of each parameter]) of each bucket of a buffer that is shared by `shards` ranks."""
    multiple = math.lcm(shards, BUCKET_ALIGNED)
    start = at = 0
    inside: list[tuple[int, int]] = []
    # From the last parameter to the first: gradients come in this order.
    for parameter in reversed(parameters):
        at = _up(at, PARAMETER_ALIGNED)
        if parameter.own_bucket and inside:
            end = _up(at, multiple)
            yield start, end, inside
            start, at, inside = end, end, []
        inside.append((at, at + parameter.numel))
        at += parameter.numel
        if at - start >= limit or parameter.own_bucket:
            end = _up(at, multiple)
            yield start, end, inside
            start, at, inside = end, end, []
    if inside:
        yield start, _up(at, multiple), inside


def held_bytes(cfg: Config, spec: ModelSpec, layout: Layout, place: Place) -> Held:
    """What the rank at `place` holds between passes. Raises LayoutError for a model that does not divide."""
    itemsize = ITEMSIZE[cfg.model.params_dtype]
    chunks = _parameters(
        spec,
        replace(layout, cp=1, dp=1),
        replace(place, shard=0, expert_shard=0),
        cfg.model.make_vocab_size_divisible_by,
        NAMING[cfg.model.transformer_impl],
    )
    # Two moments, and a main parameter where the parameter itself is not fp32.
    state = 12 if itemsize == 2 else 8
    if not cfg.parallel.use_distributed_optimizer:
        numel = sum(parameter.numel for chunk in chunks for parameter in chunk)
        return Held(numel * itemsize, numel * 4, numel * state)
    sizes = 0
    kept = 0
    for index, chunk in enumerate(chunks):
        bucketed = cfg.parallel.overlap_grad_reduce and place.stage == 0 and index == 0
        limit = max(40_000_000, 1_000_000 * layout.dp) if bucketed else math.inf
        # Experts that are shared out have fewer replicas than the rest, and so a buffer of their own.
        for apart, shards, shard in (
            (False, layout.dp * layout.cp, place.shard),
            (True, layout.expert_replicas, place.expert_shard),
        ):
            inside_buffer = [parameter for parameter in chunk if parameter.apart == apart]
            for start, end, inside in _buckets(inside_buffer, limit, shards):
                share = (end - start) // shards
                first = start + shard * share
                kept += sum(max(0, min(stop, first + share) - max(begin, first)) for begin, stop in inside)
                sizes += end - start
    return Held(sizes * itemsize, sizes * 4, kept * state)
