"""One rank of test_execute.py: many reshards after one another in the same processes; every result checked by bits.

Cases: (architecture, tied, TP, PP, VPP, EP) -> engine TP, another Megatron layout, files, or everything on every rank;
in several dtypes, bucket sizes and node sizes (a node of 1 sends everything through the process group). Rank 0 prints
one JSON object a case.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
import torch.distributed as torch_dist

from tests.reshard.worlds import DENSE, model
from tests.whole import whole_side
from treepo_mega.modelspec.mcore_layout import hf_shapes
from treepo_mega.reshard.checksums import differing_groups
from treepo_mega.reshard.execute import Resharder, TensorTarget
from treepo_mega.reshard.plan import Cluster
from treepo_mega.reshard.sides import Grid, files_side, mcore_side, vllm_side
from treepo_mega.runtime import dist

fp32, bf16 = torch.float32, torch.bfloat16
GRIDS = [Grid(1, 1), Grid(2, 1), Grid(4, 1)]
GRIDS += [Grid(tp, pp, vpp) for tp, pp in ((1, 2), (1, 4), (2, 2)) for vpp in (None, 2)]
DENSE_TURNS = itertools.cycle(itertools.product(DENSE, (False, True)))
DTYPES = itertools.cycle([(fp32, fp32), (bf16, bf16), (fp32, bf16), (bf16, fp32)])
SIZES = itertools.cycle([(1 << 20, 4), (300, 4), (4000, 1), (900, 2)])
# architecture, tied, grid, target, source dtype, target dtype, bucket bytes, ranks a node
CASES = [(*next(DENSE_TURNS), grid, tp_v, *next(DTYPES), *next(SIZES)) for grid in GRIDS for tp_v in (1, 2, 4)] + [
    ("Qwen3ForCausalLM", False, Grid(2, 1, naming="te"), 4, bf16, fp32, 300, 4),
    ("Qwen2ForCausalLM", True, Grid(4, 1), Grid(1, 4), fp32, fp32, 900, 4),
    ("Qwen3ForCausalLM", False, Grid(2, 2), Grid(4, 1), bf16, bf16, 900, 2),
    ("LlamaForCausalLM", False, Grid(2, 2, 2), "files", fp32, fp32, 2000, 4),
    ("Qwen3ForCausalLM", True, Grid(2, 1, divisible_by=16), "whole", fp32, fp32, 500, 4),
    ("Qwen3ForCausalLM", True, Grid(2, 2, divisible_by=16), "whole", bf16, bf16, 500, 4),
    ("Qwen3ForCausalLM", False, Grid(1, 2, 2, divisible_by=16), "whole", fp32, fp32, 1 << 20, 4),
    ("MixtralForCausalLM", False, Grid(2, 1, ep=2), 2, fp32, fp32, 2000, 4),
    ("Qwen3MoeForCausalLM", True, Grid(1, 2, ep=2, naming="te"), 4, bf16, bf16, 700, 2),
]


def local(full, chunks, dtype):
    """A rank's parameters cut from the HF tensors; padding is zero."""
    out = []
    for params in chunks:
        tensors = {n: torch.zeros(p.shape, dtype=dtype) for n, p in params.items()}
        for name, p in params.items():
            for b in p.blocks:
                tensors[name][b.local_index] = full[b.hf_name][b.hf_index].to(dtype)
        out.append(tensors)
    return out


def run(case) -> dict[str, object]:
    architecture, tied, grid, to, source_dtype, target_dtype, bucket, per_node = case
    spec = model(architecture, tie_word_embeddings=tied)
    world, rank = dist.world_size(), dist.rank()
    source = mcore_side(spec, grid, world)
    if isinstance(to, int):
        target = vllm_side(spec, to, world)
    elif isinstance(to, Grid):
        target = mcore_side(spec, to, world)
    else:
        target = {"files": files_side, "whole": whole_side}[to](spec, world)
    wire = source_dtype if source_dtype.itemsize <= target_dtype.itemsize else target_dtype
    resharder = Resharder.between(
        source,
        target,
        source_dtype=source_dtype,
        target_dtype=target_dtype,
        bucket_bytes=bucket,
        timeout_s=60,
        cluster=Cluster(world, per_node),
    )
    assert resharder.wire_dtype == wire
    received = 0
    for seed in (1, 2):  # the second call reuses buffers and counters
        generator = torch.Generator().manual_seed(seed)
        full = {n: torch.randn(s, generator=generator).to(source_dtype) for n, s in hf_shapes(spec).items()}
        held = local(full, source.of(rank), source_dtype)
        got = [{n: torch.zeros(p.shape, dtype=target_dtype) for n, p in params.items()} for params in target.of(rank)]
        stats = resharder(held, TensorTarget(got), checksums=seed == 2)
        want = local({n: t.to(wire) for n, t in full.items()}, target.of(rank), target_dtype)
        for have, expected in zip(got, want, strict=True):
            assert have.keys() == expected.keys()
            assert all(torch.equal(have[n], t) for n, t in expected.items())
        for have, expected in zip(held, local(full, source.of(rank), source_dtype), strict=True):
            assert all(torch.equal(have[n], t) for n, t in expected.items()), "sources are only read"
        received = int(dist.sum_over_ranks({"bytes": float(stats.bytes_received)})["bytes"])
    assert set(stats.checksums) == {b.hf_name for ps in target.of(rank) for p in ps.values() for b in p.blocks}
    assert differing_groups(stats.checksums) == []
    assert resharder.transport.buffer_bytes <= 2 * bucket
    return {"moved": received, "bound": resharder.plan.traffic().bound, "rounds": resharder.plan.round_count}


def main() -> None:
    """All cases, in this process."""
    torch_dist.init_process_group("gloo")
    for case in CASES:
        result = run(case)
        if dist.is_main():
            print("CASE " + json.dumps({"name": " ".join(map(str, case)), **result}), flush=True)
    dist.leave()


if __name__ == "__main__":
    sys.exit(main())
