"""treepo_mega: TreePO reinforcement learning on Megatron-Core with a co-located vLLM tree generator."""

__version__ = "0.1.0"
