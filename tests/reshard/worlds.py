"""Small models and layouts for planning tests, and a reshard carried out in NumPy as a plan says."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.reshard.plan import Cluster, Copy, ReshardPlan
from treepo_mega.reshard.sides import ChunkLayouts, Grid, Side

DENSE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM")


def model(architecture: str = "Qwen2ForCausalLM", **changes: object) -> ModelSpec:
    """A small model whose sizes are all different; divides over tp 4, pp 4 x vpp 2."""
    values: dict[str, object] = {
        "hidden_size": 6, "num_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2,
        "intermediate_size": 12, "vocab_size": 29, "qkv_bias": architecture.startswith("Qwen2"),
        "qk_norm": architecture.startswith("Qwen3"),
    }  # fmt: skip
    if architecture in EXPERTS:
        values |= {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 8}
    if architecture == "Qwen2MoeForCausalLM":
        values["shared_expert_intermediate_size"] = 4
    return ModelSpec(architecture, **{**values, **changes})


@st.composite
def reshards(draw, architectures=DENSE + EXPERTS):
    """(spec, grid, TP_v, cluster) over TP, PP {1, 2, 4} x VPP {1, 2} -> TP_v {1, 2, 4}, replicas and node sizes."""
    architecture = draw(st.sampled_from(architectures))
    tp, pp, tp_v = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    ep = draw(st.sampled_from([1, 2])) if architecture in EXPERTS else 1
    kv = draw(st.sampled_from([k for k in (1, 2, 4, 8) if k % tp == 0]))
    spec = model(
        architecture,
        hidden_size=draw(st.integers(1, 5)),
        num_layers=pp * vpp * draw(st.integers(1, 2)),
        num_key_value_heads=kv,
        num_attention_heads=max(kv, tp_v) * draw(st.integers(1, 2)),
        head_dim=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 150)),
        tie_word_embeddings=draw(st.booleans()),
    )
    divisible_by, naming = draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from(["local", "te"]))
    grid = Grid(tp, pp, vpp, ep, divisible_by, naming, draw(st.sampled_from([None, 1, 2])) if ep > 1 else None)
    world = grid.period * pp * draw(st.sampled_from([1, 2]))
    world *= -(-tp_v // np.gcd(world, tp_v))
    return spec, grid, tp_v, Cluster(world, draw(st.sampled_from([1, 2, 4, world])))


def full_tensors(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Every HF tensor, all elements of the model different."""
    out, at = {}, 1
    for name, shape in hf_shapes(spec).items():
        out[name] = np.arange(at, at + int(np.prod(shape)), dtype=np.float64).reshape(shape)
        at += out[name].size
    return out


def sliced(full: dict[str, np.ndarray], chunks: ChunkLayouts) -> list[dict[str, np.ndarray]]:
    """A rank's parameters, cut straight from the HF tensors; padding is zero."""
    out = []
    for params in chunks:
        local = {}
        for name, param in params.items():
            local[name] = np.zeros(param.shape)
            for b in param.blocks:
                local[name][b.local_index] = full[b.hf_name][b.hf_index]
        out.append(local)
    return out


def holder(source: Side, rank: int, copy: Copy, values: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The elements of `copy` as `rank` holds them."""
    for chunk, params in enumerate(source.of(rank)):
        for name, param in params.items():
            for b in param.blocks:
                if (b.hf_name, b.hf_slice) == (copy.hf_name, copy.held):
                    shift = [t[0] - h[0] for t, h in zip(b.local_slice, b.hf_slice, strict=True)]
                    index = tuple(slice(x + s, y + s) for (x, y), s in zip(copy.box, shift, strict=True))
                    return values[chunk][name][index]
    raise AssertionError(f"rank {rank} does not hold {copy}")


def carry_out(plan: ReshardPlan, source: Side, target: Side, full: dict[str, np.ndarray]):
    """(every rank's parameters after the plan, how often each element was written, elements received per rank)."""
    world = plan.cluster.world_size
    held = [sliced(full, source.of(r)) for r in range(world)]
    got = [[{n: np.zeros(p.shape) for n, p in params.items()} for params in target.of(r)] for r in range(world)]
    writes = [[{n: np.zeros(p.shape, int) for n, p in params.items()} for params in target.of(r)] for r in range(world)]
    received = np.zeros(world, np.int64)
    rounds = [plan.for_rank(r) for r in range(world)]
    for i in range(plan.round_count):
        buffers: list[dict[int, np.ndarray]] = []
        for r in range(world):
            parts = {}
            for parcel in rounds[r][i].sends:
                assert parcel.source == r and r not in parcel.targets
                flat = [holder(source, r, c, held[r]).ravel() for c in parcel.copies]
                parts[parcel.offset] = np.concatenate(flat)
            buffers.append(parts)

        def write(r: int, copy: Copy, values: np.ndarray) -> None:
            index = tuple(slice(*s) for s in copy.target_box)
            place = got[r][copy.chunk][copy.param][index]
            place[...] = values.reshape(place.shape)
            writes[r][copy.chunk][copy.param][index] += 1

        for r in range(world):
            for copy in rounds[r][i].local:
                write(r, copy, holder(source, r, copy, held[r]))
            for parcel in rounds[r][i].receives:
                assert r in parcel.targets
                values, at = buffers[parcel.source][parcel.offset], 0
                received[r] += values.size
                for copy in parcel.copies:
                    write(r, copy, values[at : at + copy.numel])
                    at += copy.numel
                assert at == values.size
    return got, writes, received
