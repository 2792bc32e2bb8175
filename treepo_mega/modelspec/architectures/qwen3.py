"""Qwen3, dense: norms on query and key heads; head_dim is 128 whatever the hidden size."""

from treepo_mega.modelspec.architectures import Architecture

ARCHITECTURE = Architecture("Qwen3ForCausalLM", qk_norm=True, head_dim=128)
