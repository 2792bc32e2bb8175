"""Reading a model's description from config.json, and refusing what is not built."""

import json

import pytest

from treepo_mega.modelspec.mcore_layout import ModelSpec, ModelSpecError, padded_vocab

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 301,
    "rms_norm_eps": 1e-5,
}


def test_defaults_of_absent_keys():
    spec = ModelSpec.from_config({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (spec.num_key_value_heads, spec.head_dim, spec.tie_word_embeddings, spec.qkv_bias, spec.qk_norm) == (
        4,
        16,
        False,
        False,
        False,
    )
    assert (spec.rope_theta, spec.rope_type, spec.rope_scaling) == (10000.0, "default", {})


def test_switches_follow_the_architecture():
    qwen2 = ModelSpec.from_config({**LLAMA, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True})
    qwen3 = ModelSpec.from_config({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tie_word_embeddings, qwen2.head_dim) == (True, False, True, 16)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tie_word_embeddings, qwen3.head_dim) == (False, True, False, 128)


def test_old_and_new_rope_keys_mean_the_same():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **llama3}}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}
    specs = [ModelSpec.from_config(c) for c in (new, old, older)]
    assert specs[0] == specs[1] == specs[2]
    assert (specs[0].rope_theta, specs[0].rope_type, specs[0].rope_scaling) == (5e5, "llama3", llama3)
    assert ModelSpec.from_config({**LLAMA, "rope_theta": 7, "rope_scaling": None}).rope_theta == 7.0


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"architectures": ["LLamaForCausalLM"]},
            ["LLamaForCausalLM", "Qwen3ForCausalLM", "did you mean 'LlamaForCausalLM'?"],
        ),
        ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "positive integer"]),
        ({"vocab_size": None, "hidden_size": "x"}, ["missing or not an integer: hidden_size, vocab_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 4"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "flat"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ],
)
def test_what_is_not_supported_is_named(change, words):
    with pytest.raises(ModelSpecError) as e:
        ModelSpec.from_config({**LLAMA, **change}, where="some/config.json")
    assert all(w in str(e.value) for w in ["some/config.json", *words]), str(e.value)


def test_files(tmp_path):
    with pytest.raises(ModelSpecError, match=r"cannot read .*config\.json: No such file"):
        ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{\n")
    with pytest.raises(ModelSpecError, match=r"config\.json:2: not valid JSON"):
        ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelSpec.from_hf(tmp_path).vocab_size == 301


@pytest.mark.parametrize(("key", "ids"), [(2, (2,)), ([7, 2], (7, 2)), (None, ())])
def test_what_others_would_read_again_is_carried(key, ids):
    spec = ModelSpec.from_config({**LLAMA, "torch_dtype": "bfloat16", "eos_token_id": key})
    assert (spec.stored_dtype, spec.eos_token_ids) == ("bfloat16", ids)
    assert ModelSpec.from_config({**LLAMA, "dtype": "float32", "torch_dtype": "bfloat16"}).stored_dtype == "float32"


def test_padded_vocab():
    spec = ModelSpec.from_config(LLAMA)
    assert [padded_vocab(spec, 128, tp) for tp in (1, 2, 4)] == [384, 512, 512]
    assert padded_vocab(spec, 1, 1) == 301
    assert padded_vocab(spec, 301, 1) == 301
