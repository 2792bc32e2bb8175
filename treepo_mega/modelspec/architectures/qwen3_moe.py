"""Qwen3-MoE: Qwen3 with experts in every layer. Their number is num_local_experts since transformers 5.

A model with some dense layers (mlp_only_layers, decoder_sparse_step) is another network and is refused.
"""

from treepo_mega.modelspec.architectures import Architecture

ARCHITECTURE = Architecture(
    "Qwen3MoeForCausalLM",
    qk_norm=True,
    experts=("num_local_experts", "num_experts"),
    expert_size="moe_intermediate_size",
    required={"mlp_only_layers": [], "decoder_sparse_step": 1},
)
