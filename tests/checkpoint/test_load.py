"""Planning and running the gather of whole HF tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.checkpoint.gather_plan import gather_plan
from treepo_mega.checkpoint.load import HfGather, fill_local, local_params
from treepo_mega.modelspec.mcore_layout import ModelSpec, chunk_layouts, hf_shapes
from treepo_mega.reshard.params import ReshardError

WORKER = Path(__file__).with_name("gather_worker.py")
SPEC = ModelSpec(
    "Qwen2ForCausalLM", hidden_size=6, num_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    intermediate_size=6, vocab_size=29, tie_word_embeddings=True, qkv_bias=True,
)  # fmt: skip


@examples(60)
@given(
    st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)]), st.booleans(), st.integers(1, 300),
    st.sampled_from([1, 16]),
)  # fmt: skip
def test_plan_sends_each_element_once_in_bounded_rounds(sizes, tied, max_elements, divisible_by):
    tp, pp, vpp = sizes
    spec = ModelSpec(**{**{f: getattr(SPEC, f) for f in SPEC.__dataclass_fields__}, "tie_word_embeddings": tied})
    layouts = [
        chunk_layouts(spec, tp=tp, pp=pp, vpp=vpp, tp_rank=t, pp_rank=p, divisible_by=divisible_by)
        for p in range(pp)
        for t in range(tp)
    ]
    plan = gather_plan(layouts, max_elements)
    shapes = hf_shapes(spec)
    seen = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    complete = []
    longest_row = max(spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.intermediate_size)
    for step in plan.rounds:
        assert len(step.sends) == tp * pp
        sent = [sum(p.block.numel for p in pieces) for pieces in step.sends]
        assert 0 < step.length == max(sent) <= max(max_elements, longest_row)
        for rank, pieces in enumerate(step.sends):
            for piece in pieces:
                param = layouts[rank][piece.chunk][piece.param]
                assert any(_inside(piece.block, block) for block in param.blocks)
                seen[piece.block.hf_name][piece.block.hf_index] += 1
        for name in step.complete:
            assert (seen[name] == 1).all(), name
        complete += step.complete
    assert sorted(complete) == sorted(shapes)
    assert plan.elements == sum(int(np.prod(s)) for s in shapes.values())


def _inside(part, whole):
    """Whether `part` is a sub-box of `whole`, shifted alike on both sides."""
    if part.hf_name != whole.hf_name:
        return False
    return all(
        w[0] <= p[0] and p[1] <= w[1] and p[0] - w[0] == lp[0] - lw[0] and p[1] - p[0] == lp[1] - lp[0]
        for p, w, lp, lw in zip(part.hf_slice, whole.hf_slice, part.local_slice, whole.local_slice, strict=True)
    )


def test_stages_send_side_by_side():
    big = ModelSpec("LlamaForCausalLM", 16, 8, 4, 4, 4, 16, 16)
    layouts = [chunk_layouts(big, tp=1, pp=4, tp_rank=0, pp_rank=p) for p in range(4)]
    plan = gather_plan(layouts, 600)
    moved = 4 * sum(r.length for r in plan.rounds)
    assert moved <= 1.3 * plan.elements  # one stage after the other would move 4 times the model


@pytest.mark.parametrize("ranks, arguments", [
    (2, (2, 1, 1, 1, "float32", 0.0005)),
    (4, (2, 2, 1, 1, "bfloat16", 0.0005)),
    (4, (1, 2, 2, 0, "float32", 64)),
])  # fmt: skip
def test_gather_over_ranks(run_ranks, ranks, arguments):
    code, out = run_ranks(ranks, WORKER, *arguments)
    assert code == 0, out
    assert "gathered GatherStats" in out


def _one_rank(dtype=torch.float32):
    layouts = chunk_layouts(SPEC, tp=1, pp=1, tp_rank=0, pp_rank=0)
    return layouts, [{n: torch.zeros(p.shape, dtype=dtype) for n, p in lay.items()} for lay in layouts]


def test_one_rank_needs_no_process_group():
    layouts, chunks = _one_rank(torch.bfloat16)
    full = {n: torch.randn(s) for n, s in hf_shapes(SPEC).items()}
    fill_local(chunks[0], layouts[0], lambda name, box: full[name][tuple(slice(*s) for s in box)])
    gather = HfGather(SPEC, tp=1, pp=1, coords=[(0, 0)], dtype=torch.bfloat16)
    got = dict(gather(chunks))
    assert all(torch.equal(got[n], full[n].bfloat16()) for n in full)
    assert (gather.stats.bytes_received, gather.stats.rounds) == (0, 1)


def test_disagreements_are_named():
    _, (params,) = _one_rank()
    gather = HfGather(SPEC, tp=1, pp=1, coords=[(0, 0)], dtype=torch.float32)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    cases = [
        ({k: v for k, v in params.items() if k != name}, "has no parameter decoder.layers.1.mlp.linear_fc2.weight"),
        (
            {**params, "decoder.layers.1.mlp.extra": torch.zeros(2)},
            "mlp.extra \\[2\\] is not in the map \\(did you mean",
        ),
        ({**params, name: torch.zeros(6, 7)}, "has shape \\[6, 7\\]; the map expects \\[6, 6\\]"),
        ({**params, name: params[name].double()}, "has dtype torch.float64; expected torch.float32"),
    ]
    for chunk, words in cases:
        with pytest.raises(ReshardError, match=words):
            list(gather([chunk]))
    with pytest.raises(ReshardError, match="2 model chunks; expected 1"):
        list(gather([params, params]))
    with pytest.raises(ReshardError, match="every \\(tp_rank, pp_rank\\)"):
        HfGather(SPEC, tp=2, pp=1, coords=[(0, 0)], dtype=torch.float32)


def test_local_params_see_through_wrappers():
    inner = torch.nn.ModuleDict({"embedding": torch.nn.Linear(2, 2, bias=False)})
    wrapped = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"module": inner})})
    assert set(local_params(wrapped)) == {"embedding.weight"}
    assert local_params(wrapped)["embedding.weight"].data_ptr() == inner["embedding"].weight.data_ptr()
