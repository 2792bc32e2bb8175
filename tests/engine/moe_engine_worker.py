"""The rank of test_moe_engine.py: `moe_engine_worker.py DIRECTORY KIND`; it reports logprobs before and after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engine_weights import write_weights
from treepo_mega.config import parse_config
from treepo_mega.engine.engine import Engine

SIZES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 128},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 64},
    "qwen2_moe": {
        "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "intermediate_size": 128,
    },
}  # fmt: skip


def write_model(directory: Path, kind: str, seed: int) -> Path:
    """A tiny checkpoint in sizes that vLLM's CPU kernels take; two of four experts a token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts_per_tok=2, vocab_size=64, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.2, **SIZES[kind],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def start(directory: Path) -> Engine:
    engine = {"max_num_batched_tokens": 1024}
    rollout = {"max_response_len": 32, "segment": {"length": 16}, "stop": {"eos_token_ids": [2]}, "engine": engine}
    data = {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 32}
    cfg = parse_config({"model": {"hf_checkpoint": str(directory)}, "data": data, "rollout": rollout})
    return Engine(directory, cfg, seed=0)


def main() -> None:
    directory, kind = Path(sys.argv[1]), sys.argv[2]
    old, new = (write_model(directory / str(seed), kind, seed) for seed in (1, 2))
    engine, fresh = start(old), start(new)
    tokens = [(7 * i) % 60 + 3 for i in range(40)]
    before, expected = engine.score(tokens), fresh.score(tokens)
    write_weights(engine, new)  # binding the map checks names and shapes, both ways
    found = {"before": before, "expected": expected, "after": engine.score(tokens)}
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
