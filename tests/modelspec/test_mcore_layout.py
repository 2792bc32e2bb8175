"""The map: every HF element once, no local overlap, and slicing then gathering is the identity."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tests.properties import examples
from treepo_mega.modelspec.mcore_layout import (
    LayoutError,
    ModelSpec,
    chunk_layouts,
    hf_shapes,
    mcore_layout,
    padded_vocab,
    stage_layers,
)


@st.composite
def layouts(draw):
    """A small spec with sizes it divides over: (spec, tp, pp, vpp, divisible_by)."""
    tp, pp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    kv = tp * draw(st.integers(1, 2))
    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        hidden_size=draw(st.integers(1, 9)),
        num_layers=pp * vpp * draw(st.integers(1, 2)),
        num_attention_heads=kv * draw(st.integers(1, 3)),
        num_key_value_heads=kv,
        head_dim=draw(st.integers(1, 4)),
        intermediate_size=tp * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    return spec, tp, pp, vpp, draw(st.sampled_from([1, 3, 8]))


def replica(spec, tp, pp, vpp, divisible_by):
    """Layouts of all chunks of all ranks of one model-parallel replica."""
    sizes = {"tp": tp, "pp": pp, "vpp": vpp, "divisible_by": divisible_by}
    return [
        params for p in range(pp) for t in range(tp) for params in chunk_layouts(spec, tp_rank=t, pp_rank=p, **sizes)
    ]


@examples(60)
@given(layouts())
def test_each_element_once_per_replica(case):
    spec, tp, pp, *_ = case
    seen = {name: np.zeros(shape, int) for name, shape in hf_shapes(spec).items()}
    for params in replica(*case):
        for param in params.values():
            local = np.zeros(param.shape, int)
            for block in param.blocks:
                assert all(0 <= a < b <= n for (a, b), n in zip(block.local_slice, param.shape, strict=True))
                assert local[block.local_index].shape == seen[block.hf_name][block.hf_index].shape == block.shape
                local[block.local_index] += 1
                seen[block.hf_name][block.hf_index] += 1
            assert local.max(initial=0) <= 1
    for name, count in seen.items():
        expected = tp if name.endswith("norm.weight") else 1
        if name == "model.embed_tokens.weight" and spec.tie_word_embeddings and pp > 1:
            expected = 2  # the last stage's copy
        assert (count == expected).all(), name


@examples(60)
@given(layouts(), st.randoms(use_true_random=False))
def test_slice_then_gather_is_the_identity(case, random):
    spec = case[0]
    rng = np.random.default_rng(random.getrandbits(32))
    full = {name: rng.standard_normal(shape) for name, shape in hf_shapes(spec).items()}
    back = {name: np.full(shape, np.nan) for name, shape in hf_shapes(spec).items()}
    for params in replica(*case):
        for param in params.values():
            local = np.zeros(param.shape)
            for block in param.blocks:
                local[block.local_index] = full[block.hf_name][block.hf_index]
            for block in param.blocks:
                back[block.hf_name][block.hf_index] = local[block.local_index]
    for name, value in full.items():
        np.testing.assert_array_equal(back[name], value)


@examples(40)
@given(layouts())
def test_only_vocabulary_padding_is_left_zero(case):
    spec, tp, _, _, divisible_by = case
    rows = {}
    for params in replica(*case):
        for name, param in params.items():
            covered = sum(b.numel for b in param.blocks)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows.setdefault(name, [0, 0])
                rows[name][0] += param.shape[0]
                rows[name][1] += covered // spec.hidden_size
            else:
                assert covered == np.prod(param.shape), name
    for name, (held, true) in rows.items():
        assert (held, true) == (padded_vocab(spec, divisible_by, tp), spec.vocab_size), name


@examples(40)
@given(layouts())
def test_stages_hold_every_layer_once_in_execution_order(case):
    spec, _, pp, vpp, _ = case
    order = [
        i for v in range(vpp) for p in range(pp) for i in stage_layers(spec, pp=pp, vpp=vpp, pp_rank=p, vp_stage=v)
    ]
    assert order == list(range(spec.num_layers))


def small(**changes):
    base = {
        "architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 2, "intermediate_size": 6, "vocab_size": 10,
    }  # fmt: skip
    return ModelSpec(**{**base, **changes})


def test_qkv_rows_are_interleaved_by_query_group():
    blocks = mcore_layout(small(), tp=2, tp_rank=1)["decoder.layers.0.self_attention.linear_qkv.weight"].blocks
    short = [(b.hf_name.split(".")[-2], b.hf_slice[0], b.local_slice[0]) for b in blocks]
    assert short == [("q_proj", (4, 8), (0, 4)), ("k_proj", (2, 4), (4, 6)), ("v_proj", (2, 4), (6, 8))]


@pytest.mark.parametrize("tied, pp, first, last", [
    (True, 1, True, False), (False, 1, True, True), (True, 2, False, True), (False, 2, False, True),
])  # fmt: skip
def test_output_layer_on_the_last_stage(tied, pp, first, last):
    params = [mcore_layout(small(tie_word_embeddings=tied), pp=pp, pp_rank=p) for p in range(pp)]
    assert ("embedding.word_embeddings.weight" in params[-1]) == first
    assert ("output_layer.weight" in params[-1]) == last
    if last:
        name = params[-1]["output_layer.weight"].blocks[0].hf_name
        assert name == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_interleaved_stage_layers():
    spec = small(num_layers=8)
    held = {(p, v): list(stage_layers(spec, pp=2, vpp=2, pp_rank=p, vp_stage=v)) for p in (0, 1) for v in (0, 1)}
    assert held == {(0, 0): [0, 1], (1, 0): [2, 3], (0, 1): [4, 5], (1, 1): [6, 7]}


@pytest.mark.parametrize("sizes, words", [
    ({"tp": 4}, "num_key_value_heads 2 \\(nearest that does: 2"),
    ({"pp": 3}, "4 layers .* pipeline size 3"),
    ({"vpp": 2}, "needs a pipeline size above 1"),
    ({"tp": 2, "tp_rank": 2}, "tp_rank is 2; expected 0 to 1"),
])  # fmt: skip
def test_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(LayoutError, match=words):
        mcore_layout(small(), **sizes)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_shapes_are_those_of_transformers(kind, tied, tmp_path):
    config = AutoConfig.for_model(
        kind, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=20, vocab_size=33, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is not listed twice
    assert hf_shapes(ModelSpec.from_hf(tmp_path)) == expected


def test_the_map_needs_no_torch():
    code = (
        "import sys, treepo_mega.modelspec.mcore_layout; "
        "print([m for m in ('torch', 'numpy', 'megatron') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"
