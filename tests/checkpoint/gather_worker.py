"""Run under torchrun: shards random HF tensors by the map, gathers them, and compares on every rank.

Arguments: TP PP VPP TIED(0|1) DTYPE(float32|bfloat16) BUCKET_MIB. World size is TP * PP * DP.
"""

import sys

import torch
import torch.distributed as dist

from treepo_mega.checkpoint.load import HfGather, fill_local, group_coords
from treepo_mega.modelspec.mcore_layout import ModelSpec, chunk_layouts, hf_shapes


def main():
    tp, pp, vpp, tied = map(int, sys.argv[1:5])
    dtype, bucket = getattr(torch, sys.argv[5]), float(sys.argv[6])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), tp * pp
    groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
    group, within = groups[rank // size], rank % size
    tp_rank, pp_rank = within % tp, pp - 1 - within // tp  # stages in reverse: group order is not Megatron's
    spec = ModelSpec(
        "Qwen3ForCausalLM", hidden_size=12, num_layers=4 * vpp, num_attention_heads=4, num_key_value_heads=2,
        head_dim=3, intermediate_size=10, vocab_size=37, tie_word_embeddings=bool(tied), qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rank // size)  # replicas differ, so mixing groups would show
    full = {n: torch.randn(s, generator=generator).to(dtype) for n, s in hf_shapes(spec).items()}
    sizes = {"tp": tp, "pp": pp, "vpp": vpp, "divisible_by": 16}
    layouts = chunk_layouts(spec, tp_rank=tp_rank, pp_rank=pp_rank, **sizes)
    chunks = [{n: torch.full(p.shape, torch.nan, dtype=dtype) for n, p in lay.items()} for lay in layouts]
    for params, lay in zip(chunks, layouts, strict=True):
        fill_local(params, lay, lambda name, box: full[name][tuple(slice(*s) for s in box)])
        assert all(torch.isfinite(p).all() for p in params.values())

    coords = group_coords(group, tp_rank, pp_rank)
    gather = HfGather(spec, **sizes, coords=coords, group=group, dtype=dtype, bucket_mib=bucket)
    for _ in range(2):
        got = dict(gather(chunks))
        assert set(got) == set(full)
        assert all(torch.equal(got[n], full[n]) for n in full)
        assert all(got[n].data_ptr() != p.data_ptr() for n in got for c in chunks for p in c.values())
    assert gather.stats.bytes_hf == sum(t.numel() * t.element_size() for t in full.values())
    if bucket < 0.01:
        assert gather.stats.rounds > 5
    dist.barrier()
    if rank == 0:
        print("gathered", gather.stats, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
