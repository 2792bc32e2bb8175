"""The architectures that the map knows: one small file each, found by looking into this folder.

A file states what `config.json` calls the architecture, how it differs from a Llama decoder, and what its Hugging
Face tensors are called. Everything else (Megatron's and vLLM's layouts, plans, refits, converters) follows. To add
one, put a file here with

    ARCHITECTURE = Architecture("SomeForCausalLM", qkv_bias=True, names=LLAMA_NAMES | {"q": "attn.wq"})

The family is that of pre-norm decoders with RMSNorm, rotary positions, grouped-query attention and gated SiLU MLPs,
dense or with routed experts in every layer, beside which a shared expert may see every token.

Roles of `names`, each the name inside a layer without `.weight` (or `.bias`): input_norm, post_norm, q, k, v, o,
q_norm, k_norm, and for a dense MLP gate, up, down; with experts router, and with `{e}` for the expert's number
expert_gate, expert_up, expert_down; with a shared expert shared, inside which gate, up and down are called gate_proj,
up_proj and down_proj, and shared_gate. vLLM's own names are attention (holds qkv_proj and o_proj), mlp (holds
gate_up_proj and down_proj, or the router's gate and the experts).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

LLAMA_NAMES: dict[str, str] = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
    "shared": "mlp.shared_expert",
    "shared_gate": "mlp.shared_expert_gate",
    "attention": "self_attn",
    "mlp": "mlp",
}


@dataclass(frozen=True)
class Architecture:
    """How an architecture differs from a plain Llama decoder.

    `qkv_bias`: the query, key and value projections have biases (the output projection never has one).
    `qk_norm`: an RMSNorm of size head_dim on every query and key head.
    `head_dim`: the value when config.json does not say; None: hidden_size / num_attention_heads.
    `experts`: keys of config.json that may hold the number of experts, first found wins; empty: a dense MLP.
    `expert_size`: key of config.json with the width of one expert.
    `norm_topk_prob`: whether the weights of a token's experts sum to 1; None: what config.json says (absent: no).
    `shared_expert_size`: key of config.json with the width of the gated expert that every token passes; None: no such.
    `required`: keys of config.json whose value must be this one (or be absent).
    """

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    experts: tuple[str, ...] = ()
    expert_size: str = "intermediate_size"
    norm_topk_prob: bool | None = None
    shared_expert_size: str | None = None
    required: Mapping[str, Any] = field(default_factory=dict, hash=False)
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES, hash=False)


def discover() -> Mapping[str, Architecture]:
    """Every ARCHITECTURE of the files on this package's `__path__`, by name."""
    found: dict[str, Architecture] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        architecture = importlib.import_module(f"{__name__}.{module}").ARCHITECTURE
        if architecture.name in found:
            raise ImportError(f"{__name__}.{module}: {architecture.name} is described twice")
        found[architecture.name] = architecture
    return MappingProxyType(found)
