"""Rotary frequencies from the ModelSpec are those that transformers computes from config.json."""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from treepo_mega.actor.model import rope_inverse_frequencies
from treepo_mega.modelspec.spec import ModelSpec, ModelSpecError

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
SHAPE |= {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 301, "max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "scaling", [{**LLAMA3, "original_max_position_embeddings": 512}, {"type": "linear", "factor": 4.0}]
)
@pytest.mark.parametrize("head_dim", [None, 32])
def test_frequencies_are_bit_equal(tmp_path, scaling, head_dim):
    config = {**SHAPE, "rope_theta": 5e5, "rope_scaling": scaling, **({"head_dim": head_dim} if head_dim else {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    expected, _ = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, torch.device("cpu"))
    found = rope_inverse_frequencies(ModelSpec.from_hf(tmp_path))
    assert found.shape == ((head_dim or 16) // 2,)
    assert torch.equal(found, expected)


def test_a_type_that_also_scales_attention_is_refused():
    spec = ModelSpec.from_config({**SHAPE, "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    with pytest.raises(ModelSpecError, match="rope_type 'yarn' is not supported; expected default, linear, llama3"):
        rope_inverse_frequencies(spec)
