"""Tensors of a transformers model with experts by the names of its files: in memory a layer's experts are stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from treepo_mega.modelspec.mcore_layout import hf_shapes
from treepo_mega.modelspec.spec import ModelSpec

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 40,
    },
}  # fmt: skip
"""What a tiny configuration of each family says of its experts, among them both orders of softmax and choice."""


def as_in_files(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """`tensors` (parameters or gradients by transformers' names) by the names of `hf_shapes`."""
    if not spec.num_experts:
        return dict(tensors)
    out = dict(tensors)
    for layer in range(spec.num_layers):
        here = f"model.layers.{layer}."
        names = {role: f"{here}{name}" for role, name in spec.names.items()}
        out[f"{names['router']}.weight"] = out.pop(f"{here}mlp.gate.weight")
        gate_up, down = (out.pop(f"{here}mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
        for expert in range(spec.num_experts):
            gate, up = gate_up[expert].chunk(2)
            for role, part in (("gate", gate), ("up", up), ("down", down[expert])):
                out[f"{names[f'expert_{role}'].format(e=expert)}.weight"] = part
    assert out.keys() >= hf_shapes(spec).keys()
    return out
