"""vLLM rotates as transformers does, for every type, with the parameters that the engine is given.

The table that vLLM multiplies by is compared in the fast lane; the slow lane starts an engine a type.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.actor.oracle import ROTATIONS
from tests.checkpoints import save_random
from treepo_mega.config import parse_config
from treepo_mega.engine.engine import Engine
from treepo_mega.modelspec.rotary import attention_factor, engine_length, engine_rope
from treepo_mega.modelspec.spec import ModelSpec

HEAD_DIM, WINDOW, LONGEST = 32, 256, 100


def rotation(name: str) -> dict[str, Any]:
    """A rotation of the actor's tests for the head size that vLLM's CPU kernels take."""
    return {key: value * 2 if isinstance(value, list) else value for key, value in ROTATIONS[name].items()}


def write_model(directory: Path, name: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=HEAD_DIM, max_position_embeddings=WINDOW, initializer_range=0.1,
        tie_word_embeddings=False, rope_parameters={"rope_theta": 10000.0, **rotation(name)},
    )  # fmt: skip
    return save_random(config, directory, 0.1)


def vllm_table(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Cosines, then sines, [LONGEST, HEAD_DIM], of the module that vLLM makes for this model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope

    length = engine_length(spec, LONGEST)
    model = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: model)
    with set_current_vllm_config(VllmConfig()):
        module = get_rope(HEAD_DIM, WINDOW, rope_parameters=engine_rope(spec), dtype=torch.float32)
    if spec.rope_type != "longrope":
        return module.cos_sin_cache[:LONGEST]
    start = module.original_max_position_embeddings if module.use_long_rope else 0
    return module.long_short_cos_sin_cache[start : start + LONGEST]


@pytest.mark.parametrize("name", ROTATIONS)
def test_vllms_table_is_the_actors(tmp_path, monkeypatch, name):
    from treepo_mega.actor.model import rope_inverse_frequencies

    directory = write_model(tmp_path / name, name)
    spec = ModelSpec.from_hf(directory)
    angles = torch.arange(LONGEST).float()[:, None] * rope_inverse_frequencies(spec, LONGEST)
    table = torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor(spec)
    found = vllm_table(spec, monkeypatch)
    assert found.shape == table.shape, "a row for every position"
    # An angle of up to 100 has steps of 8e-6 in fp32, and the two sides round at different places.
    assert (found - table).abs().max() <= 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ROTATIONS)
def test_an_engine_gives_the_logprobs_of_transformers(tmp_path, keep_alive, name):
    directory = write_model(tmp_path / name, name)
    rollout = {"max_response_len": LONGEST - 32, "segment": {"length": 16}, "stop": {"eos_token_ids": [2]}}
    cfg = parse_config(
        {
            "model": {"hf_checkpoint": str(directory)},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 32},
            "rollout": {**rollout, "engine": {"max_num_batched_tokens": 1024}},
        }
    )
    keep_alive.append(Engine(directory, cfg, seed=0))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for length in (24, LONGEST):
        tokens = [(7 * i) % 60 + 3 for i in range(length)]
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(keep_alive[-1].score(tokens))
        assert (found[-(length - 1) :] - logp).abs().max() <= 1e-4
