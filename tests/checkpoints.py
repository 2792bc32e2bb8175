"""Random checkpoints for tests, made by transformers, in which no parameter is trivial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def save_random(config: Any, directory: Path, spread: float) -> Path:
    """A random fp32 model of `config`, seeded by the caller; biases are about 0 and norms about 1, by `spread`."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * spread + (1 if "norm" in name else 0))
    model.save_pretrained(directory)
    return directory
