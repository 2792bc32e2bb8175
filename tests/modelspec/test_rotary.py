"""Rotary types against transformers' own modules, in every spelling of config.json, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.actor.oracle import ROTATIONS
from treepo_mega.modelspec.rotary import (
    ROTARY_TYPES,
    attention_factor,
    check_rotary,
    engine_length,
    engine_rope,
    long_factors,
)
from treepo_mega.modelspec.spec import ModelSpec, ModelSpecError

HEAD_DIM, WINDOW = 16, 256
SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 83,
    "max_position_embeddings": WINDOW, "rms_norm_eps": 1e-6,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
MORE = {
    "yarn with its own attention factor": {**ROTATIONS["yarn"], "attention_factor": 1.5},
    "yarn as DeepSeek scales it": {**ROTATIONS["yarn"], "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False},
    "yarn with its own borders": {**ROTATIONS["yarn"], "beta_fast": 16, "beta_slow": 2},
    "longrope with a factor": {**ROTATIONS["longrope"], "factor": 3.0},
    "longrope with its own attention factor": {**ROTATIONS["longrope"], "attention_factor": 1.25},
}


def spellings(rope: dict[str, object]) -> dict[str, dict[str, object]]:
    """config.json with these rotary parameters, in every way that is met."""
    older = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    out = {
        "rope_parameters": {**SIZES, "rope_parameters": {"rope_theta": 5e4, **rope}},
        "rope_scaling": {**SIZES, "rope_theta": 5e4, "rope_scaling": rope},
        "rope_scaling with type": {**SIZES, "rope_theta": 5e4, "rope_scaling": older},
        "both": {**SIZES, "rope_theta": 5e4, "rope_scaling": older, "rope_parameters": {"rope_theta": 5e4, **rope}},
    }
    original = "original_max_position_embeddings"
    if original in rope:
        inner = {key: value for key, value in older.items() if key != original}
        out["beside"] = {**SIZES, "rope_theta": 5e4, "rope_scaling": inner, original: rope[original]}
    return out


def spec_of(rope: dict[str, object], **more: object) -> ModelSpec:
    return ModelSpec.from_config({**SIZES, "rope_parameters": {"rope_theta": 5e4, **rope}, **more})


@pytest.mark.parametrize("name", [*ROTATIONS, *MORE])
def test_frequencies_and_attention_factor_are_those_of_transformers_in_every_spelling(tmp_path, name):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from treepo_mega.actor.model import rope_inverse_frequencies

    rope = {**ROTATIONS, **MORE}[name]
    for spelling, config in spellings(rope).items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        spec = ModelSpec.from_hf(tmp_path)
        rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
        for longest in (8, 100):
            rotary(torch.zeros(1), torch.arange(longest)[None])  # chooses the factors for this length
            found = rope_inverse_frequencies(spec, longest)
            assert torch.equal(found, rotary.inv_freq), (spelling, longest)
        assert attention_factor(spec) == pytest.approx(rotary.attention_scaling, rel=1e-15), spelling
    assert attention_factor(spec) > 1 or spec.rope_type not in ("yarn", "longrope")


def test_every_type_is_among_those_compared():
    assert {rope["rope_type"] for rope in ROTATIONS.values()} == set(ROTARY_TYPES) - {"default"}


def test_longrope_takes_one_set_of_factors_for_a_whole_run():
    spec = spec_of({**LONGROPE, "original_max_position_embeddings": 64})
    assert [long_factors(spec, longest) for longest in (1, 64, 65, 200)] == [False, False, True, True]
    # vLLM compares its max_model_len with the same border: equal choices for every length that a run can have.
    for longest in range(1, WINDOW + 1):
        assert (engine_length(spec, longest) > 64) == long_factors(spec, longest)
        assert longest <= engine_length(spec, longest) <= WINDOW
    assert engine_length(spec_of({"rope_type": "default"}), 64) == 65


def test_the_engine_is_told_the_factors_that_it_would_compute_otherwise():
    assert isinstance(engine_rope(spec_of({"rope_type": "linear", "factor": 4}))["factor"], float)
    rope = {**LONGROPE, "original_max_position_embeddings": 64, "attention_factor": 1.25}
    told = engine_rope(spec_of(rope))
    assert told["short_mscale"] == told["long_mscale"] == 1.25
    scale = math.sqrt(1 + math.log(4) / math.log(64))
    del rope["attention_factor"]
    assert engine_rope(spec_of(rope))["long_mscale"] == pytest.approx(scale)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "rope, message",
    [
        (
            {"rope_type": "yarm"},
            r"rope_type 'yarm' is not supported; expected .*\(did you mean 'yarn'\?\)",
        ),
        ({"rope_type": "su"}, r"did you mean 'longrope'\?"),
        ({"factor": 4.0}, "a factor 4.0 but no rope_type"),
        ({"rope_type": "linear"}, "factor of the rotary parameters is None; expected a number of at least 1"),
        ({"rope_type": "linear", "factor": 0.5}, "factor .* is 0.5; expected a number of at least 1"),
        ({"rope_type": "dynamic", "factor": True}, "factor .* is True"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha is 1000.0 .*vLLM would compute another"),
        ({"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 64}, "max_trained_positions is 64"),
        ({**YARN, "beta_fast": None}, "beta_fast .* is None; expected a positive number"),
        ({**YARN, "attention_factor": 0}, "attention_factor .* is 0; expected a positive number"),
        ({**YARN, "original_max_position_embeddings": 16}, r"= 100 exceeds the 64 positions of rope_type 'yarn'"),
        ({**LONGROPE, "short_factor": [1.0]}, "short_factor .* is a list of 1; expected a list of head_dim / 2 = 8"),
        ({**LONGROPE, "long_factor": None}, "long_factor .* is None; expected a list"),
        ({**LONGROPE, "long_factor": [0.0] * 8}, "an element of long_factor .* is 0.0"),
        ({**LONGROPE, "long_mscale": 1.2}, "long_mscale is 1.2"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor .* is None"),
    ],
)
def test_what_actor_and_engine_would_not_compute_alike_is_refused(rope, message):
    with pytest.raises(ModelSpecError, match=rf"^here: .*{message}"):
        check_rotary(spec_of(rope), 100, "here")


def test_rotary_parameters_that_contradict_one_another_are_refused():
    config = {**SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {**YARN}}
    with pytest.raises(ModelSpecError, match=r"rope_parameters .* and rope_scaling .* do not agree; keep one"):
        ModelSpec.from_config(config)
    with pytest.raises(ModelSpecError, match="rope_type 'default' and type 'mrope'; keep rope_type alone"):
        spec_of({"rope_type": "default", "type": "mrope"})


def test_dual_chunk_attention_is_refused_with_the_way_out():
    with pytest.raises(ModelSpecError, match=r"dual_chunk_attention_config is .*; leave the key out"):
        ModelSpec.from_config({**SIZES, "dual_chunk_attention_config": {"chunk_size": 1024}})
