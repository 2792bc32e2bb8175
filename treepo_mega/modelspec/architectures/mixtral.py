"""Mixtral: every MLP is a router and experts, whose projections are called w1 (gate), w3 (up) and w2 (down)."""

from treepo_mega.modelspec.architectures import LLAMA_NAMES, Architecture

ARCHITECTURE = Architecture(
    "MixtralForCausalLM",
    experts=("num_local_experts",),
    norm_topk_prob=True,
    required={"sliding_window": None, "router_jitter_noise": 0.0},
    names=LLAMA_NAMES
    | {
        "router": "block_sparse_moe.gate",
        "expert_gate": "block_sparse_moe.experts.{e}.w1",
        "expert_up": "block_sparse_moe.experts.{e}.w3",
        "expert_down": "block_sparse_moe.experts.{e}.w2",
        "mlp": "block_sparse_moe",
    },
)
