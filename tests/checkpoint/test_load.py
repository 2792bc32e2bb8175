"""Filling Megatron's parameters from HF tensors, and collecting HF tensors again on one rank."""

import itertools

import pytest
import torch

from treepo_mega.checkpoint.load import fill_local, local_params
from treepo_mega.modelspec.mcore_layout import ModelSpec, chunk_layouts, hf_shapes
from treepo_mega.reshard.execute import Resharder, TensorTarget
from treepo_mega.reshard.params import ReshardError
from treepo_mega.reshard.sides import Grid, files_side, mcore_side

SPEC = ModelSpec(
    "Qwen2ForCausalLM", hidden_size=6, num_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    intermediate_size=6, vocab_size=29, tie_word_embeddings=True, qkv_bias=True,
)  # fmt: skip


def _full():
    return {n: torch.randn(s) for n, s in hf_shapes(SPEC).items()}


def _one_rank(dtype=torch.float32):
    layouts = chunk_layouts(SPEC, tp=1, pp=1, tp_rank=0, pp_rank=0)
    return layouts, [{n: torch.full(p.shape, torch.nan, dtype=dtype) for n, p in lay.items()} for lay in layouts]


def _resharder(dtype):
    return Resharder.between(
        mcore_side(SPEC, Grid(), 1),
        files_side(SPEC, 1),
        source_dtype=dtype,
        target_dtype=dtype,
        bucket_bytes=1 << 20,
        timeout_s=60,
    )


@pytest.mark.parametrize("tp, pp, vpp", [(2, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_filling_leaves_no_element_out_and_padding_is_zero(tp, pp, vpp):
    full = _full()
    for tp_rank, pp_rank in itertools.product(range(tp), range(pp)):
        layouts = chunk_layouts(SPEC, tp=tp, pp=pp, vpp=vpp, tp_rank=tp_rank, pp_rank=pp_rank, divisible_by=16)
        for layout in layouts:
            params = {n: torch.full(p.shape, torch.nan) for n, p in layout.items()}
            fill_local(params, layout, lambda name, box: full[name][tuple(slice(*s) for s in box)])
            assert all(torch.isfinite(p).all() for p in params.values())
            for name, p in layout.items():
                filled = torch.zeros(p.shape, dtype=torch.bool)
                for b in p.blocks:
                    filled[b.local_index] = True
                    assert torch.equal(params[name][b.local_index].reshape(b.shape), full[b.hf_name][b.hf_index])
                assert not params[name][~filled].any()


def test_one_rank_needs_no_process_group():
    layouts, chunks = _one_rank(torch.bfloat16)
    full = _full()
    fill_local(chunks[0], layouts[0], lambda name, box: full[name][tuple(slice(*s) for s in box)])
    resharder = _resharder(torch.bfloat16)
    for _ in range(2):
        got = {n: torch.full_like(t, torch.nan, dtype=torch.bfloat16) for n, t in full.items()}
        stats = resharder(chunks, TensorTarget([got]))
        assert all(torch.equal(got[n], full[n].bfloat16()) for n in full)
        assert (stats.bytes_received, resharder.plan.round_count) == (0, 1)
        assert stats.bytes_local == sum(t.nbytes for t in got.values())


def test_disagreements_are_named():
    _, (params,) = _one_rank()
    resharder = _resharder(torch.float32)
    target = TensorTarget([_full()])
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    cases = [
        ({k: v for k, v in params.items() if k != name}, "has no parameter decoder.layers.1.mlp.linear_fc2.weight"),
        ({**params, "decoder.layers.1.mlp.extra": torch.zeros(2)}, "mlp.extra \\[2\\] is not in the map \\(did you"),
        ({**params, name: torch.zeros(6, 7)}, "has shape \\[6, 7\\]; the map expects \\[6, 6\\]"),
        ({**params, name: params[name].double()}, "has dtype torch.float64; expected torch.float32"),
    ]
    for chunk, words in cases:
        with pytest.raises(ReshardError, match=words):
            resharder([chunk], target)
    with pytest.raises(ReshardError, match="2 model chunks; expected 1"):
        resharder([params, params], target)
    resharder([params], target)


def test_local_params_see_through_wrappers():
    inner = torch.nn.ModuleDict({"embedding": torch.nn.Linear(2, 2, bias=False)})
    wrapped = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"module": inner})})
    assert set(local_params(wrapped)) == {"embedding.weight"}
    assert local_params(wrapped)["embedding.weight"].data_ptr() == inner["embedding"].weight.data_ptr()
