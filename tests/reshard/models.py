"""Checkpoints for tests that need a certain shape."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from tests.checkpoints import save_random


def write_qwen2(directory: Path, seed: int) -> Path:
    """A tiny tied Qwen2 with biases and norms that matter, in sizes that vLLM's CPU kernels take."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen2", hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=96, vocab_size=64, tie_word_embeddings=True, max_position_embeddings=256,
        initializer_range=0.2,
    )  # fmt: skip
    return save_random(config, directory, 0.3)
