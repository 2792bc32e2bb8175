"""Where every parameter of Megatron's model lies in Hugging Face tensor space: the one map.

    spec = ModelSpec.from_hf(directory)
    params = mcore_layout(spec, tp=2, pp=2, vpp=1, tp_rank=0, pp_rank=1, vp_stage=0, divisible_by=128)
    params["decoder.layers.0.mlp.linear_fc1.weight"].blocks   # [Block(hf_name, hf_slice, local_slice), ...]

A `Block` says: this box of that HF tensor equals this box of my local parameter. Slices are `((start, stop), ...)`,
one pair per dimension; both boxes of a block have the same shape. Loading copies HF boxes into local ones, exporting
copies them back. Nothing else knows how Megatron (megatron-core 0.16) arranges tensors. The module is pure (no
torch): any rank, or a laptop, can state the layout of every other rank.

One HF element can have several replicas: norms over tensor-parallel ranks, and the tied embedding's copy. `naming`
"te" are Transformer Engine's names (`linear_fc1.layer_norm_weight`, `experts.linear_fc1.weight3`), "local"
Megatron's own (`pre_mlp_layernorm.weight`, `experts.local_experts.3.linear_fc1.weight`). Expert-parallel rank
ep_rank has num_experts / ep experts, each split over `etp` expert-tensor-parallel ranks as a dense MLP is over `tp`.
The router is whole on every rank, and a shared expert is split as a dense MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ARCHITECTURES, Architecture, ModelSpec, ModelSpecError, padded_vocab

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Block",
    "Box",
    "LayoutError",
    "ModelSpec",
    "ModelSpecError",
    "Naming",
    "ParamLayout",
    "check_parallel",
    "chunk_layouts",
    "hf_shapes",
    "mcore_layout",
    "padded_vocab",
    "stage_layers",
]

Box = tuple[tuple[int, int], ...]
"""A box in a tensor: (start, stop) per dimension."""

Naming = Literal["local", "te"]
"""Which layer spec's parameter names: Megatron's own modules, or Transformer Engine's."""
NAMING: dict[str, Naming] = {"local": "local", "transformer_engine": "te", "auto": "local"}
"""Of each `model.transformer_impl`. The start replaces auto; a plan without a process needs some names, and any do."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


class LayoutError(TreepoError):
    """The model cannot be laid out on these parallel sizes; the message names the size and the nearest that fits."""


@dataclass(frozen=True, slots=True)
class Block:
    """`hf_slice` of HF tensor `hf_name` equals `local_slice` of the local parameter.

    Both have the same shape, except that a local parameter which stacks several HF tensors (vLLM's experts) has one
    more dimension in front, in which the block is 1 wide.
    """

    hf_name: str
    hf_slice: Box
    local_slice: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the box."""
        return tuple(stop - start for start, stop in self.hf_slice)

    @property
    def numel(self) -> int:
        """Elements in the box."""
        elements = 1
        for size in self.shape:
            elements *= size
        return elements

    @property
    def hf_index(self) -> tuple[slice, ...]:
        """`hf_slice` as an index for numpy, torch or safetensors."""
        return tuple(slice(start, stop) for start, stop in self.hf_slice)

    @property
    def local_index(self) -> tuple[slice, ...]:
        """`local_slice` as an index."""
        return tuple(slice(start, stop) for start, stop in self.local_slice)


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """A rank's parameter: its local shape, and what of it comes from HF. Elements in no block are zero."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class _Rank:
    """Sizes seen by one tensor-parallel rank."""

    spec: ModelSpec
    tp: int
    tp_rank: int

    def part(self, size: int) -> tuple[int, int]:
        """This rank's (start, stop) of a dimension that TP splits evenly."""
        share = size // self.tp
        return self.tp_rank * share, (self.tp_rank + 1) * share


def _box(*sizes: int) -> Box:
    return tuple((0, size) for size in sizes)


def _whole(hf_name: str, *sizes: int) -> ParamLayout:
    """A parameter every TP rank holds whole."""
    return ParamLayout(sizes, (Block(hf_name, _box(*sizes), _box(*sizes)),))


def _columns(rank: _Rank, hf_name: str, rows: int, columns: int) -> ParamLayout:
    """A row-parallel linear layer: TP splits the input dimension, the weight's columns."""
    start, stop = rank.part(columns)
    return ParamLayout((rows, stop - start), (Block(hf_name, ((0, rows), (start, stop)), _box(rows, stop - start)),))


def _vocab_rows(rank: _Rank, hf_name: str, divisible_by: int) -> ParamLayout:
    """Rows of the padded vocabulary; a rank that holds only padding has no block."""
    spec = rank.spec
    start, end = rank.part(padded_vocab(spec, divisible_by, rank.tp))
    shape = (end - start, spec.hidden_size)
    # Rows beyond the true vocabulary have no block and are zero.
    stop = min(end, spec.vocab_size)
    if stop <= start:
        return ParamLayout(shape, ())
    rest = (0, spec.hidden_size)
    return ParamLayout(shape, (Block(hf_name, ((start, stop), rest), ((0, stop - start), rest)),))


def _gate_up(rank: _Rank, gate: str, up: str, size: int) -> ParamLayout:
    """This rank's rows of the gate projection above its rows of the up projection, of `size` rows each."""
    # Megatron splits gate and up apart; a part of the stacked [gate | up] would give rank 0 all of the gate.
    start, stop = rank.part(size)
    height = stop - start
    rest = (0, rank.spec.hidden_size)
    blocks = (
        Block(f"{gate}.weight", ((start, stop), rest), ((0, height), rest)),
        Block(f"{up}.weight", ((start, stop), rest), ((height, 2 * height), rest)),
    )
    return ParamLayout((2 * height, rank.spec.hidden_size), blocks)


def _qkv(rank: _Rank, prefix: str, kind: str) -> ParamLayout:
    """Interleaved rows of q, k and v by query group; `kind` is "weight" (2-d) or "bias" (1-d)."""
    spec = rank.spec
    first, last = rank.part(spec.num_key_value_heads)
    per_group = spec.num_attention_heads // spec.num_key_value_heads
    rest: Box = ((0, spec.hidden_size),) if kind == "weight" else ()
    blocks = []
    row = 0
    # For each key/value head: its query heads, then k, then v. [q | k | v] would load without an error, and be wrong.
    for group in range(first, last):
        for role, heads in (("q", per_group), ("k", 1), ("v", 1)):
            rows = heads * spec.head_dim
            start = group * rows
            hf_slice = ((start, start + rows), *rest)
            blocks.append(Block(f"{prefix}{spec.names[role]}.{kind}", hf_slice, ((row, row + rows), *rest)))
            row += rows
    return ParamLayout((row, *(size for _, size in rest)), tuple(blocks))


@dataclass(frozen=True, slots=True)
class _Experts:
    """The experts that one expert-parallel rank holds, what it holds of each, and how they are called."""

    first: int
    stop: int
    rank: _Rank
    naming: Naming

    def name(self, local: int, linear: str) -> str:
        """Megatron's name inside the layer of local expert `local`'s linear layer."""
        if self.naming == "te":
            return f"mlp.experts.{linear}.weight{local}"
        return f"mlp.experts.local_experts.{local}.{linear}.weight"


def _layer(rank: _Rank, hf_layer: int, experts: _Experts) -> dict[str, ParamLayout]:
    """Parameters of one transformer layer, by their names inside the layer."""
    spec = rank.spec
    hidden = spec.hidden_size
    te = experts.naming == "te"
    prefix = f"model.layers.{hf_layer}."
    names = {role: f"{prefix}{name}" for role, name in spec.names.items()}
    # Transformer Engine fuses a norm into the linear layer after it, but never the norm before a router.
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight"
    fused = te and not spec.num_experts
    pre_mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    params = {
        input_norm: _whole(f"{names['input_norm']}.weight", hidden),
        "self_attention.linear_qkv.weight": _qkv(rank, prefix, "weight"),
        "self_attention.linear_proj.weight": _columns(
            rank, f"{names['o']}.weight", hidden, spec.num_attention_heads * spec.head_dim
        ),
        pre_mlp_norm: _whole(f"{names['post_norm']}.weight", hidden),
    }
    params |= _moe(rank, names, experts) if spec.num_experts else _mlp(rank, names)
    if spec.qkv_bias:
        params["self_attention.linear_qkv.bias"] = _qkv(rank, prefix, "bias")
    if spec.qk_norm:
        params["self_attention.q_layernorm.weight"] = _whole(f"{names['q_norm']}.weight", spec.head_dim)
        params["self_attention.k_layernorm.weight"] = _whole(f"{names['k_norm']}.weight", spec.head_dim)
    return params


def _mlp(rank: _Rank, names: dict[str, str]) -> dict[str, ParamLayout]:
    """A dense MLP."""
    spec = rank.spec
    return {
        "mlp.linear_fc1.weight": _gate_up(rank, names["gate"], names["up"], spec.intermediate_size),
        "mlp.linear_fc2.weight": _columns(rank, f"{names['down']}.weight", spec.hidden_size, spec.intermediate_size),
    }


def _moe(rank: _Rank, names: dict[str, str], experts: _Experts) -> dict[str, ParamLayout]:
    """The router, whole on every rank, this rank's experts, and its part of the shared one."""
    spec = rank.spec
    hidden = spec.hidden_size
    params = {"mlp.router.weight": _whole(f"{names['router']}.weight", spec.num_experts, hidden)}
    for local, expert in enumerate(range(experts.first, experts.stop)):
        gate, up, down = (names[f"expert_{role}"].format(e=expert) for role in ("gate", "up", "down"))
        size = spec.expert_intermediate_size
        params[experts.name(local, "linear_fc1")] = _gate_up(experts.rank, gate, up, size)
        params[experts.name(local, "linear_fc2")] = _columns(experts.rank, f"{down}.weight", hidden, size)
    if size := spec.shared_expert_intermediate_size:
        gate, up, down = (f"{names['shared']}.{role}_proj" for role in ("gate", "up", "down"))
        params["mlp.shared_experts.linear_fc1.weight"] = _gate_up(rank, gate, up, size)
        params["mlp.shared_experts.linear_fc2.weight"] = _columns(rank, f"{down}.weight", hidden, size)
        params["mlp.shared_experts.gate_weight"] = _whole(f"{names['shared_gate']}.weight", 1, hidden)
    return params


def check_parallel(spec: ModelSpec, tp: int, pp: int, vpp: int = 1, ep: int = 1, etp: int | None = None) -> None:
    """Raise LayoutError unless the model divides evenly over these sizes; `etp` None: as `tp`."""
    # Megatron can duplicate key/value heads when `tp` exceeds them; this map does not state where the copies lie.
    width = "shared_expert_intermediate_size" if spec.num_experts else "intermediate_size"
    for name in ("num_attention_heads", "num_key_value_heads", width):
        _require_divisor("tensor-parallel size", tp, name, getattr(spec, name))
    if spec.num_experts:
        size = spec.expert_intermediate_size
        _require_divisor("expert-tensor-parallel size", etp or tp, "expert_intermediate_size", size)
    if pp < 1 or vpp < 1 or spec.num_layers % (pp * vpp):
        raise LayoutError(
            f"{spec.num_layers} layers cannot be split evenly over pipeline size {pp} x virtual size {vpp} stages"
        )
    if vpp > 1 and pp == 1:
        raise LayoutError(f"virtual pipeline size {vpp} needs a pipeline size above 1")
    if ep > 1 and not spec.num_experts:
        raise LayoutError(f"expert-parallel size {ep} needs a model with experts; {spec.architecture} has none")
    if ep != 1:
        _require_divisor("expert-parallel size", ep, "num_experts", spec.num_experts)


def _require_divisor(what: str, parts: int, name: str, size: int) -> None:
    """Raise LayoutError unless `size` of the model's `name` divides by `parts`."""
    if parts < 1 or size % parts:
        near = max(divisor for divisor in range(1, max(1, parts) + 1) if size % divisor == 0)
        raise LayoutError(f"{what} {parts} does not divide the model's {name} {size} (nearest that does: {near})")


def stage_layers(spec: ModelSpec, *, pp: int, vpp: int, pp_rank: int, vp_stage: int) -> range:
    """HF layer numbers of a chunk, in order: Megatron's interleaved schedule (its layer offset, even split)."""
    # Interleaved: the chunks of one pipeline rank are L / vpp layers apart, not neighbours.
    count = spec.num_layers // (pp * vpp)
    start = vp_stage * (spec.num_layers // vpp) + pp_rank * count
    return range(start, start + count)


def mcore_layout(
    spec: ModelSpec,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = 1,
    tp_rank: int = 0,
    pp_rank: int = 0,
    vp_stage: int = 0,
    divisible_by: int = 128,
    *,
    ep: int = 1,
    ep_rank: int = 0,
    etp: int | None = None,
    etp_rank: int | None = None,
    naming: Naming = "local",
) -> dict[str, ParamLayout]:
    """Layout of one chunk of one rank, by Megatron's parameter names (layer index local to the chunk).

    `etp` and `etp_rank` None: experts are split as the other matrices are, over `tp`. `vpp` is the number of chunks per
    pipeline rank (1 or None: no virtual stages), `divisible_by` the configuration's make_vocab_size_divisible_by.
    Raises LayoutError when the model does not divide over the sizes, or a rank is out of range.
    """
    vpp = vpp or 1
    check_parallel(spec, tp, pp, vpp, ep, etp)
    of_expert = _Rank(spec, etp or tp, tp_rank if etp_rank is None else etp_rank)
    given = (("tp_rank", tp_rank, tp), ("pp_rank", pp_rank, pp), ("vp_stage", vp_stage, vpp), ("ep_rank", ep_rank, ep))
    for name, index, size in (*given, ("etp_rank", of_expert.tp_rank, of_expert.tp)):
        if not 0 <= index < size:
            raise LayoutError(f"{name} is {index}; expected 0 to {size - 1}")
    rank = _Rank(spec, tp, tp_rank)
    first = pp_rank == 0 and vp_stage == 0
    last = pp_rank == pp - 1 and vp_stage == vpp - 1
    params: dict[str, ParamLayout] = {}
    if first:
        params["embedding.word_embeddings.weight"] = _vocab_rows(rank, EMBEDDING, divisible_by)
    held = spec.num_experts // ep
    experts = _Experts(ep_rank * held, (ep_rank + 1) * held, of_expert, naming)
    layers = stage_layers(spec, pp=pp, vpp=vpp, pp_rank=pp_rank, vp_stage=vp_stage)
    for local, hf_layer in enumerate(layers):
        for name, param in _layer(rank, hf_layer, experts).items():
            params[f"decoder.layers.{local}.{name}"] = param
    if last:
        params["decoder.final_layernorm.weight"] = _whole(FINAL_NORM, spec.hidden_size)
        # Tied embeddings need no head on a single stage. With more, the last stage holds a copy under the head's name.
        if not (spec.tie_word_embeddings and first):
            head = EMBEDDING if spec.tie_word_embeddings else LM_HEAD
            params["output_layer.weight"] = _vocab_rows(rank, head, divisible_by)
    return params


def chunk_layouts(
    spec: ModelSpec,
    *,
    tp: int,
    pp: int,
    vpp: int | None = 1,
    tp_rank: int,
    pp_rank: int,
    divisible_by: int = 128,
    ep: int = 1,
    ep_rank: int = 0,
    etp: int | None = None,
    etp_rank: int | None = None,
    naming: Naming = "local",
) -> list[dict[str, ParamLayout]]:
    """`mcore_layout` of every chunk of one rank, in the order of its virtual stages."""
    more: dict[str, Any] = {"ep": ep, "ep_rank": ep_rank, "etp": etp, "etp_rank": etp_rank, "naming": naming}
    return [mcore_layout(spec, tp, pp, vpp, tp_rank, pp_rank, stage, divisible_by, **more) for stage in range(vpp or 1)]


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint and its shape, in the order of the model. Tied: no lm_head.weight."""
    shapes: dict[str, tuple[int, ...]] = {}
    # Undivided: each tensor's extent is its blocks' reach.
    for param in mcore_layout(spec, divisible_by=1).values():
        for block in param.blocks:
            reach = tuple(stop for _, stop in block.hf_slice)
            known = shapes.get(block.hf_name, reach)
            shapes[block.hf_name] = tuple(max(stops) for stops in zip(known, reach, strict=True))
    return shapes
