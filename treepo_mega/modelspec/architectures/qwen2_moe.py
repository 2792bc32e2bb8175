"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts in every layer, and one more that every token passes.

The output of the shared expert is multiplied by a sigmoid of the token's hidden state. A model with some dense layers
(mlp_only_layers, decoder_sparse_step) is another network and is refused.
"""

from treepo_mega.modelspec.architectures import Architecture

ARCHITECTURE = Architecture(
    "Qwen2MoeForCausalLM",
    qkv_bias=True,
    experts=("num_experts",),
    expert_size="moe_intermediate_size",
    shared_expert_size="shared_expert_intermediate_size",
    required={"qkv_bias": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
)
