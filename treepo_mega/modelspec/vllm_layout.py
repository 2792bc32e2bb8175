"""Where every parameter of a vLLM worker lies in Hugging Face tensor space: the map's other side.

    params = vllm_layout(spec, tp=2, tp_rank=1)
    params["model.layers.0.self_attn.qkv_proj.weight"].blocks

Shapes and names are those that vLLM 0.32 gives its modules before it packs or quantises them:
- `qkv_proj` is this rank's query heads, then its key heads, then its value heads. With more ranks than key/value
  heads, each head is held by tp / heads ranks.
- `gate_up_proj` is this rank's part of gate above its part of up; experts are stacked, `w13_weight` [E, 2 I/tp, H]
  and `w2_weight` [E, H, I/tp], every rank holding its part of every expert; a shared one is split as a dense MLP.
- With expert parallelism a rank holds E/tp neighbouring experts whole: `w13_weight` [E/tp, 2 I, H], `w2_weight`
  [E/tp, H, I]. That is vLLM's linear placement. Router and shared expert are as without it.
- Embedding and output rows are those of the vocabulary padded to a multiple of 64, split evenly; rows beyond the
  true vocabulary have no block and are zero.
- Tied embeddings: the output layer is the embedding's parameter; there is none of its own.

Pure, like `layout.py`. Whether the engine really has these names and shapes is checked when it is bound
(`vllm_target.py`).
"""

from __future__ import annotations

from treepo_mega.modelspec.mcore_layout import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    Block,
    Box,
    LayoutError,
    ModelSpec,
    ParamLayout,
)

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this."""


def check_engine_parallel(spec: ModelSpec, tp: int, *, expert_parallel: bool = False) -> None:
    """Raise LayoutError unless a vLLM engine can split the model over `tp` ranks."""
    if expert_parallel and not spec.num_experts:
        raise LayoutError(f"{spec.architecture} has no experts for an engine with expert parallelism")
    of_experts = "num_experts" if expert_parallel else "expert_intermediate_size"
    widths = (of_experts, "shared_expert_intermediate_size")
    for name in ("num_attention_heads", *(widths if spec.num_experts else ("intermediate_size",))):
        size = getattr(spec, name)
        if tp < 1 or size % tp:
            near = max(divisor for divisor in range(1, max(1, tp) + 1) if size % divisor == 0)
            raise LayoutError(
                f"engine tensor-parallel size {tp} does not divide the model's {name} {size} "
                f"(nearest that does: {near})"
            )
    kv = spec.num_key_value_heads
    if kv % tp and tp % kv:
        raise LayoutError(
            f"engine tensor-parallel size {tp} neither divides num_key_value_heads {kv} nor is a multiple"
        )
    padded = _padded(spec)
    if padded % tp:
        raise LayoutError(f"engine tensor-parallel size {tp} does not divide the padded vocabulary {padded}")


def vllm_layout(
    spec: ModelSpec, tp: int = 1, tp_rank: int = 0, *, expert_parallel: bool = False
) -> dict[str, ParamLayout]:
    """Layout of worker `tp_rank` of an engine over `tp` ranks, by vLLM's parameter names, in the model's order.

    `expert_parallel`: each rank holds whole experts. Raises LayoutError when the model does not divide, or the rank is
    out of range.
    """
    check_engine_parallel(spec, tp, expert_parallel=expert_parallel)
    if not 0 <= tp_rank < tp:
        raise LayoutError(f"tp_rank is {tp_rank}; expected 0 to {tp - 1}")
    params = {EMBEDDING: _vocab_rows(spec, EMBEDDING, tp, tp_rank)}
    for layer in range(spec.num_layers):
        inside = _layer(spec, layer, tp, tp_rank, expert_parallel)
        params |= {f"model.layers.{layer}.{name}": param for name, param in inside.items()}
    params[FINAL_NORM] = _whole(FINAL_NORM, spec.hidden_size)
    if not spec.tie_word_embeddings:
        params[LM_HEAD] = _vocab_rows(spec, LM_HEAD, tp, tp_rank)
    return params


def _padded(spec: ModelSpec) -> int:
    return -(-spec.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _part(size: int, tp: int, tp_rank: int) -> tuple[int, int]:
    share = size // tp
    return tp_rank * share, (tp_rank + 1) * share


def _whole(hf_name: str, *sizes: int) -> ParamLayout:
    box = tuple((0, size) for size in sizes)
    return ParamLayout(sizes, (Block(hf_name, box, box),))


def _vocab_rows(spec: ModelSpec, hf_name: str, tp: int, tp_rank: int) -> ParamLayout:
    start, end = _part(_padded(spec), tp, tp_rank)
    shape = (end - start, spec.hidden_size)
    stop = min(end, spec.vocab_size)
    if stop <= start:
        return ParamLayout(shape, ())
    rest = (0, spec.hidden_size)
    return ParamLayout(shape, (Block(hf_name, ((start, stop), rest), ((0, stop - start), rest)),))


def _stacked(parts: list[tuple[str, int, int]], rest: Box) -> ParamLayout:
    """Rows [start, stop) of each HF tensor, one below the other."""
    blocks = []
    row = 0
    for hf_name, start, stop in parts:
        blocks.append(Block(hf_name, ((start, stop), *rest), ((row, row + stop - start), *rest)))
        row += stop - start
    return ParamLayout((row, *(size for _, size in rest)), tuple(blocks))


def _qkv(spec: ModelSpec, names: dict[str, str], kind: str, tp: int, tp_rank: int) -> ParamLayout:
    rest: Box = ((0, spec.hidden_size),) if kind == "weight" else ()
    # With more ranks than key/value heads, `shared` neighbouring ranks hold the same head.
    shared = max(1, tp // spec.num_key_value_heads)
    # vLLM splits [q | k | v] at two places. Megatron interleaves the three by key/value head.
    query = _part(spec.num_attention_heads, tp, tp_rank)
    key = _part(spec.num_key_value_heads, tp // shared, tp_rank // shared)
    parts = [
        (f"{names[role]}.{kind}", start * spec.head_dim, stop * spec.head_dim)
        for role, (start, stop) in (("q", query), ("k", key), ("v", key))
    ]
    return _stacked(parts, rest)


def _columns(hf_name: str, rows: int, columns: tuple[int, int]) -> ParamLayout:
    start, stop = columns
    width = stop - start
    return ParamLayout((rows, width), (Block(hf_name, ((0, rows), (start, stop)), ((0, rows), (0, width))),))


def _layer(spec: ModelSpec, layer: int, tp: int, tp_rank: int, expert_parallel: bool) -> dict[str, ParamLayout]:
    """Parameters of one layer, by vLLM's names inside it."""
    short = spec.names
    hidden = spec.hidden_size
    names = {role: f"model.layers.{layer}.{name}" for role, name in short.items()}
    attention = short["attention"]
    mlp = short["mlp"]
    heads = _part(spec.num_attention_heads * spec.head_dim, tp, tp_rank)
    params = {
        "input_layernorm.weight": _whole(f"{names['input_norm']}.weight", hidden),
        f"{attention}.qkv_proj.weight": _qkv(spec, names, "weight", tp, tp_rank),
        f"{attention}.o_proj.weight": _columns(f"{names['o']}.weight", hidden, heads),
        "post_attention_layernorm.weight": _whole(f"{names['post_norm']}.weight", hidden),
    }
    if spec.qkv_bias:
        params[f"{attention}.qkv_proj.bias"] = _qkv(spec, names, "bias", tp, tp_rank)
    if spec.qk_norm:
        params[f"{attention}.q_norm.weight"] = _whole(f"{names['q_norm']}.weight", spec.head_dim)
        params[f"{attention}.k_norm.weight"] = _whole(f"{names['k_norm']}.weight", spec.head_dim)
    if spec.num_experts:
        params[f"{mlp}.gate.weight"] = _whole(f"{names['router']}.weight", spec.num_experts, hidden)
        experts = range(spec.num_experts)
        part = _part(spec.expert_intermediate_size, tp, tp_rank)
        if expert_parallel:
            experts = range(*_part(spec.num_experts, tp, tp_rank))
            part = (0, spec.expert_intermediate_size)
        return params | _shared_expert(spec, names, tp, tp_rank) | _experts(spec, names, mlp, experts, part)
    start, stop = _part(spec.intermediate_size, tp, tp_rank)
    gate_up = [(f"{names[role]}.weight", start, stop) for role in ("gate", "up")]
    params[f"{mlp}.gate_up_proj.weight"] = _stacked(gate_up, ((0, hidden),))
    params[f"{mlp}.down_proj.weight"] = _columns(f"{names['down']}.weight", hidden, (start, stop))
    return params


def _shared_expert(spec: ModelSpec, names: dict[str, str], tp: int, tp_rank: int) -> dict[str, ParamLayout]:
    """The expert that every token passes, under the names of the files; nothing where there is none."""
    if not spec.shared_expert_intermediate_size:
        return {}
    hidden = spec.hidden_size
    start, stop = _part(spec.shared_expert_intermediate_size, tp, tp_rank)
    short = spec.names["shared"]
    gate_up = [(f"{names['shared']}.{role}_proj.weight", start, stop) for role in ("gate", "up")]
    return {
        f"{spec.names['shared_gate']}.weight": _whole(f"{names['shared_gate']}.weight", 1, hidden),
        f"{short}.gate_up_proj.weight": _stacked(gate_up, ((0, hidden),)),
        f"{short}.down_proj.weight": _columns(f"{names['shared']}.down_proj.weight", hidden, (start, stop)),
    }


def _experts(
    spec: ModelSpec, names: dict[str, str], mlp: str, experts: range, part: tuple[int, int]
) -> dict[str, ParamLayout]:
    """The two stacked parameters of a layer's `experts`, of each the columns [start, stop) of its inside."""
    start, stop = part
    width = stop - start
    hidden = (0, spec.hidden_size)
    w13 = []
    w2 = []
    for place, expert in enumerate(experts):
        here = (place, place + 1)
        gate, up, down = (names[f"expert_{role}"].format(e=expert) + ".weight" for role in ("gate", "up", "down"))
        w13.append(Block(gate, ((start, stop), hidden), (here, (0, width), hidden)))
        w13.append(Block(up, ((start, stop), hidden), (here, (width, 2 * width), hidden)))
        w2.append(Block(down, (hidden, (start, stop)), (here, hidden, (0, width))))
    prefix = f"{mlp}.experts.routed_experts"
    return {
        f"{prefix}.w13_weight": ParamLayout((len(experts), 2 * width, spec.hidden_size), tuple(w13)),
        f"{prefix}.w2_weight": ParamLayout((len(experts), spec.hidden_size, width), tuple(w2)),
    }
