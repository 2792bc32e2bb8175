"""Qwen2 and Qwen2.5: biases on the query, key and value projections."""

from treepo_mega.modelspec.architectures import Architecture

ARCHITECTURE = Architecture("Qwen2ForCausalLM", qkv_bias=True)
