"""Mixture-of-experts models in a real vLLM engine: its parameters are those of the map, and written through it in place
they make the engine that is loaded from the files. (Training such models is refused.)"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engine_weights import write_weights
from treepo_mega.config import parse_config
from treepo_mega.engine.engine import Engine

SIZES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 128},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 64},
}


def write_model(directory, kind, seed):
    """A tiny checkpoint in sizes that vLLM's CPU kernels take; two of four experts a token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts_per_tok=2, vocab_size=64, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.2, **SIZES[kind],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def start(directory, keep_alive):
    engine = {"max_num_batched_tokens": 1024}
    rollout = {"max_response_len": 32, "segment": {"length": 16}, "stop": {"eos_token_ids": [2]}, "engine": engine}
    data = {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 32}
    cfg = parse_config({"model": {"hf_checkpoint": str(directory)}, "data": data, "rollout": rollout})
    keep_alive.append(Engine(directory, cfg, seed=0))
    return keep_alive[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_experts_written_by_the_map_are_those_that_are_loaded(tmp_path, keep_alive, kind):
    old, new = (write_model(tmp_path / str(seed), kind, seed) for seed in (1, 2))
    engine, fresh = start(old, keep_alive), start(new, keep_alive)
    tokens = [(7 * i) % 60 + 3 for i in range(40)]
    before, expected = engine.score(tokens), fresh.score(tokens)
    assert before != expected
    write_weights(engine, new)  # binding the map checks names and shapes, both ways
    assert engine.score(tokens) == expected, "bit for bit"
