"""Plans: every wanted element once, from the nearest holder, in bounded buffers, at the lower bound, fast."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.properties import examples
from tests.reshard.worlds import carry_out, full_tensors, model, reshards, sliced
from treepo_mega.modelspec.mcore_layout import LayoutError, ModelSpec, hf_shapes
from treepo_mega.reshard.plan import Cluster, PlanError, plan_reshard
from treepo_mega.reshard.sides import Grid, Side, files_side, mcore_side, vllm_side

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "configs"


def missing_elements(spec, plan, source, target):
    """Elements that a rank wants and does not hold, and that its node does not hold: counted one by one."""
    world = plan.cluster.world_size
    shapes = hf_shapes(spec)
    own = [{n: np.zeros(s, bool) for n, s in shapes.items()} for _ in range(world)]
    for r in range(world):
        for params in source.of(r):
            for p in params.values():
                for b in p.blocks:
                    own[r][b.hf_name][b.hf_index] = True
    missing = missing_node = 0
    for r in range(world):
        peers = [q for q in range(world) if q // plan.cluster.ranks_per_node == r // plan.cluster.ranks_per_node]
        for params in target.of(r):
            for p in params.values():
                for b in p.blocks:
                    missing += int((~own[r][b.hf_name][b.hf_index]).sum())
                    node = np.logical_or.reduce([own[q][b.hf_name][b.hf_index] for q in peers])
                    missing_node += int((~node).sum())
    return missing, missing_node


@examples(60)
@given(reshards(), st.sampled_from([40, 400, 100_000]), st.booleans())
def test_every_element_arrives_once_at_the_lower_bound(case, bucket, whole):
    spec, grid, tp_v, cluster = case
    source = mcore_side(spec, grid, cluster.world_size)
    target = vllm_side(spec, tp_v, cluster.world_size, expert_parallel=whole and spec.num_experts > 0)
    try:
        plan = plan_reshard(source, target, cluster, itemsize=2, bucket_bytes=bucket)
    except PlanError:  # rows that do not fit; its words have a test of their own
        assume(bucket > 40)
        raise
    full = full_tensors(spec)
    got, writes, received = carry_out(plan, source, target, full)
    for r in range(cluster.world_size):
        for chunk, want in enumerate(sliced(full, target.of(r))):
            for name, value in want.items():
                np.testing.assert_array_equal(got[r][chunk][name], value)
                np.testing.assert_array_equal(writes[r][chunk][name], value != 0)
    t = plan.traffic()
    assert t.moved == t.bound == 2 * int(received.sum())
    missing, missing_node = missing_elements(spec, plan, source, target)
    assert (t.bound, t.bound_network) == (2 * missing, 2 * missing_node)
    assert t.by_link["network"] == t.bound_network
    rounds = [plan.for_rank(r) for r in range(cluster.world_size)]
    held = [2 * (sum(p.numel for p in x.sends) + sum(p.numel for p in x.receives)) for rank in rounds for x in rank]
    assert max(held) == t.buffer_max <= bucket


def test_whole_experts_go_to_the_rank_of_the_engine_that_holds_them():
    spec = model("Qwen3MoeForCausalLM", num_experts=8)
    source, target = mcore_side(spec, Grid(ep=4), 4), vllm_side(spec, 2, 4, expert_parallel=True)
    plan = plan_reshard(source, target, Cluster(4, 4), itemsize=2)
    sent = {
        (copy.hf_name.split(".experts.")[1].partition(".")[0], rank % 2)
        for rank in range(4)
        for one in plan.for_rank(rank)
        for parcel in one.receives
        for copy in parcel.copies
    }
    assert sent == {(str(expert), expert // 4) for expert in range(8)}, "nothing else moves: all ranks hold attention"
    # A rank's engine wants four experts and its actor holds two, which are among them on the first and the last rank.
    of_expert = 3 * spec.num_layers * spec.hidden_size * spec.expert_intermediate_size
    assert plan.traffic().moved == plan.traffic().bound == 2 * of_expert * (2 + 4 + 4 + 2)
    with pytest.raises(LayoutError, match=r"size 3 does not divide the model's num_experts 8 \(nearest that does: 2\)"):
        vllm_side(model("Qwen3MoeForCausalLM", num_experts=8, num_attention_heads=12), 3, 6, expert_parallel=True)
    with pytest.raises(LayoutError, match="Qwen2ForCausalLM has no experts"):
        vllm_side(model(), 2, 4, expert_parallel=True)


@examples(30)
@given(reshards(), reshards(), st.sampled_from([1_000, 10_000]))
def test_from_megatron_to_another_megatron_layout_and_to_files(a, b, bucket):
    spec, grid, _, cluster = a
    other = Grid(b[1].tp if spec.num_key_value_heads % b[1].tp == 0 else 1, divisible_by=5)
    world = cluster.world_size * other.tp // int(np.gcd(cluster.world_size, other.tp))
    cluster = Cluster(world, cluster.ranks_per_node)
    source = mcore_side(spec, grid, world)
    full = full_tensors(spec)
    for target in (mcore_side(spec, other, world), files_side(spec, world)):
        try:
            plan = plan_reshard(source, target, cluster, itemsize=4, bucket_bytes=bucket)
        except PlanError:  # rows that do not fit
            assume(bucket > 1_000)
            raise
        assert plan.buffer_bytes <= bucket
        got, writes, received = carry_out(plan, source, target, full)
        for r in range(world):
            for chunk, want in enumerate(sliced(full, target.of(r))):
                assert all(np.array_equal(got[r][chunk][n], v) for n, v in want.items())
                assert all(np.array_equal(writes[r][chunk][n], v != 0) for n, v in want.items())
        t = plan.traffic()
        assert t.moved == t.bound == 4 * int(received.sum())
    written = {n: sum(n in params for r in range(world) for params in target.of(r)) for n in full}
    assert set(written.values()) == {1}, "of the files, every tensor is written once"


def test_stages_send_side_by_side():
    big = ModelSpec("LlamaForCausalLM", 16, 8, 4, 4, 4, 16, 16)
    plan = plan_reshard(
        mcore_side(big, Grid(pp=4), 4), vllm_side(big, 1, 4), Cluster(4, 4), itemsize=2, bucket_bytes=4096
    )
    rounds = [plan.for_rank(r) for r in range(4)]
    sent = np.array([[sum(p.numel for p in each.sends) for each in rank] for rank in rounds])
    assert sent.shape[1] > 5
    # One stage after the other would take four times as long as all of them at once.
    assert 4 * sent.max(axis=0).sum() <= 1.3 * sent.sum()


def test_nearest_source_first_and_replicas_share_the_work():
    spec, grid = model(), Grid(tp=2, pp=2)
    world = 16  # four replicas; nodes of 8 hold two replicas of one stage each
    plan = plan_reshard(
        mcore_side(spec, grid, world), vllm_side(spec, 2, world), Cluster(world, 8), itemsize=2, bucket_bytes=1 << 20
    )
    source = mcore_side(spec, grid, world)
    for r in plan.routes:
        holders = set(np.flatnonzero(np.isin(source.of_rank, r.holders)).tolist())
        for target, chosen in zip(r.targets.tolist(), r.sources.tolist(), strict=True):
            near = {h for h in holders if h // 8 == target // 8}
            assert chosen in holders
            assert chosen == target if target in holders else chosen in near if near else True
    sent = np.zeros(world, np.int64)
    for r in plan.routes:
        np.add.at(sent, r.sources[r.sources != r.targets], r.numel)
    assert sent.max() - sent.min() <= max(r.numel for r in plan.routes)


def test_the_plan_is_a_function_of_the_configuration_alone():
    def make(**changes):
        grid = Grid(**{"tp": 2, "pp": 2, **changes})
        return plan_reshard(mcore_side(model(), grid, 8), vllm_side(model(), 2, 8), Cluster(8, 4), itemsize=2)

    assert make().digest == make().digest
    assert len({make().digest, make(vpp=2).digest, make(tp=4).digest, make(pp=4).digest}) == 4


def test_what_cannot_be_planned_is_named():
    spec = model()
    half = mcore_side(spec, Grid(pp=2), 2)
    alone = Side(half.layouts[:1], np.zeros(2, np.int64))
    with pytest.raises(PlanError, match=r"model\.layers\.4\..*: 0 of .* elements are held"):
        plan_reshard(alone, vllm_side(spec, 1, 2), Cluster(2, 2), itemsize=2)
    with pytest.raises(PlanError, match="a bucket of 8 bytes cannot hold"):
        plan_reshard(half, vllm_side(spec, 1, 2), Cluster(2, 2), itemsize=2, bucket_bytes=8)
    with pytest.raises(LayoutError, match=r"engine tensor-parallel size 3 does not divide .*num_attention_heads 8"):
        vllm_side(spec, 3, 6)
    with pytest.raises(LayoutError, match="world size 6 is not a multiple of TP 4"):
        mcore_side(spec, Grid(tp=4), 6)
    with pytest.raises(LayoutError, match="expert-parallel size 3"):
        mcore_side(model("MixtralForCausalLM"), Grid(ep=3), 3)


@pytest.mark.parametrize("pp, dp, tp_v", [(8, 8, 8), (16, 32, 8), (16, 32, 1)])
def test_70b_on_thousands_of_ranks(pp, dp, tp_v):
    spec, world = ModelSpec.from_hf(EXAMPLES / "llama3_70b"), 8 * pp * dp
    plan = plan_reshard(
        mcore_side(spec, Grid(8, pp), world), vllm_side(spec, tp_v, world), Cluster(world, 8), itemsize=2,
        bucket_bytes=256 << 20,
    )  # fmt: skip
    plan.for_rank(world - 1)
    t = plan.traffic()
    assert t.moved == t.bound and t.by_link["network"] == t.bound_network
    assert sum(t.by_link.values()) >= world // tp_v * 2 * sum(map(np.prod, hf_shapes(spec).values()))
    assert len(plan.routes) <= 8 * (2 * pp + 2), "work grows with coordinates, not with ranks squared"


@pytest.mark.parametrize(
    "shape, tp, dp, tp_v, idle",
    [("qwen25_7b", 2, 2, 4, [3]), ("qwen25_7b", 2, 4, 4, [4, 7]), ("llama3_70b", 4, 2, 8, [7])],
)
def test_some_layouts_leave_ranks_without_a_message(shape, tp, dp, tp_v, idle):
    """NCCL's first call needs all ranks of a group, so these need the collective with which `dist.initialize` ends."""
    spec, world = ModelSpec.from_hf(EXAMPLES / shape), tp * dp
    source, target = mcore_side(spec, Grid(tp=tp), world), vllm_side(spec, tp_v, world)
    plan = plan_reshard(source, target, Cluster(world, 8), itemsize=2, bucket_bytes=64 << 20)
    silent = [rank for rank in range(world) if not any(r.sends or r.receives for r in plan.for_rank(rank))]
    assert silent == idle
