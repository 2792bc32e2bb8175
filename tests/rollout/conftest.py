"""The one engine of this folder's tests: a tiny Llama, prompts of 64 tokens, responses of 64."""

from __future__ import annotations

from pathlib import Path

import pytest

from treepo_mega.config import Config, parse_config
from treepo_mega.engine.engine import Engine

BLOCK = 32
"""Tokens of a KV block: with segments of 16, every other border is in the middle of one."""


def config(hf: Path) -> Config:
    raw = {
        "model": {"hf_checkpoint": str(hf)},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
        "rollout": {
            "n_samples_per_prompt": 8,
            "max_response_len": 64,
            "segment": {"length": 16},
            "engine": {"max_num_batched_tokens": 1024, "block_size": BLOCK},
        },
    }
    return parse_config(raw)


@pytest.fixture(scope="session")
def engine(tiny_llama: Path, keep_alive: list[object]) -> Engine:
    made = Engine(tiny_llama, config(tiny_llama))
    keep_alive.append(made)
    return made
