"""Bugs to plant in the map: each takes the trainer's side of a reshard and returns it with one mistake in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from treepo_mega.modelspec.mcore_layout import Block, ParamLayout
from treepo_mega.reshard.sides import Side

Change = Callable[[int, Block], Block]


def mapped(side: Side, change: Change) -> Side:
    """The side with `change(coordinate, block)` in place of every block."""
    layouts = []
    for c, chunks in enumerate(side.layouts):
        layouts.append(
            [
                {n: ParamLayout(p.shape, tuple(change(c, b) for b in p.blocks)) for n, p in params.items()}
                for params in chunks
            ]
        )
    return Side(tuple(layouts), side.of_rank)


def exchanged(side: Side, a: str, b: str) -> Side:
    """Two HF tensors, or all whose names contain `a` or `b`, under each other's names."""

    def change(_: int, block: Block) -> Block:
        for this, that in ((a, b), (b, a)):
            if this in block.hf_name:
                return replace(block, hf_name=block.hf_name.replace(this, that))
        return block

    return mapped(side, change)


def rotated(side: Side, name: str, size: int, by: int, dim: int = 0) -> Side:
    """Blocks of one HF tensor moved by `by` along `dim`, around its end; blocks must not straddle the end then."""

    def change(_: int, block: Block) -> Block:
        if block.hf_name != name:
            return block
        box = list(block.hf_slice)
        a, b = box[dim]
        start = (a + by) % size
        box[dim] = (start, start + b - a)
        return replace(block, hf_slice=tuple(box))

    return mapped(side, change)


def reversed_inside(side: Side, name: str) -> Side:
    """The holder's blocks of one HF tensor in the opposite order: groups of heads mixed up within a rank."""
    layouts = []
    for chunks in side.layouts:
        out = []
        for params in chunks:
            out.append({n: _reversed(p, name) for n, p in params.items()})
        layouts.append(out)
    return Side(tuple(layouts), side.of_rank)


def _reversed(param: ParamLayout, name: str) -> ParamLayout:
    own = [b for b in param.blocks if b.hf_name == name]
    boxes = iter([b.hf_slice for b in reversed(own)])
    return ParamLayout(
        param.shape, tuple(replace(b, hf_slice=next(boxes)) if b.hf_name == name else b for b in param.blocks)
    )


L0, L1 = "model.layers.0.", "model.layers.1."
BUGS: dict[str, Callable[[Side], Side]] = {
    # For the model of test_refit.py: Qwen2, hidden 128, 4 heads, 4 key/value heads of 32, MLP 96, TP 2 x PP 2.
    "K and V swapped": lambda s: exchanged(s, f"{L1}self_attn.k_proj.weight", f"{L1}self_attn.v_proj.weight"),
    "biases of K and V swapped": lambda s: exchanged(s, f"{L0}self_attn.k_proj.bias", f"{L0}self_attn.v_proj.bias"),
    "a bias of another layer": lambda s: exchanged(s, f"{L0}self_attn.v_proj.bias", f"{L1}self_attn.v_proj.bias"),
    "gate and up swapped": lambda s: exchanged(s, f"{L0}mlp.gate_proj", f"{L0}mlp.up_proj"),
    "one TP slice shifted, columns": lambda s: rotated(s, f"{L1}mlp.down_proj.weight", 96, 48, dim=1),
    "one TP slice shifted, rows": lambda s: rotated(s, f"{L0}mlp.up_proj.weight", 96, 48),
    "heads in another order within a rank": lambda s: reversed_inside(s, f"{L1}self_attn.q_proj.weight"),
    "output projection of another rank": lambda s: rotated(s, f"{L0}self_attn.o_proj.weight", 128, 64, dim=1),
    "two layers swapped": lambda s: exchanged(s, L0, L1),
    "norms of a layer swapped": lambda s: exchanged(s, f"{L0}input_layernorm", f"{L0}post_attention_layernorm"),
    "final norm swapped with a layer's": lambda s: exchanged(s, "model.norm.weight", f"{L1}input_layernorm.weight"),
    "halves of the vocabulary swapped": lambda s: rotated(s, "model.embed_tokens.weight", 64, 32),
}
