"""One rank of test_device.py: the first collective on its device, then a batch of sends as in a refit.

Rank r sends to r + 1. From three ranks on, the last one neither sends nor receives; a single rank sends to itself.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from treepo_mega.runtime.device import backend, bind

COUNT = 1 << 20


def exchange(rank: int, members: int, place: torch.device) -> None:
    """One batch among the first `members` ranks, in a ring. Point to point."""
    mine = torch.full((COUNT,), float(rank), device=place)
    got = torch.full((COUNT,), -1.0, device=place)
    before = (rank - 1) % members
    sends = dist.P2POp(dist.isend, mine, (rank + 1) % members)
    takes = dist.P2POp(dist.irecv, got, before)
    for work in dist.batch_isend_irecv([sends, takes]):
        work.wait()
    assert torch.equal(got.cpu(), torch.full((COUNT,), float(before)))


def main() -> None:
    """Collective over all ranks."""
    place = bind()
    deadline = timedelta(seconds=60)
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=deadline)
    else:
        dist.init_process_group(backend(), timeout=deadline, store=dist.HashStore(), rank=0, world_size=1)
    rank = dist.get_rank()
    world = dist.get_world_size()
    # The first collective of the group is one of all ranks, as in treepo_mega.runtime.dist.initialize: else NCCL
    # would wait in the batch below for the rank without operations.
    ones = torch.ones(1, device=place)
    dist.all_reduce(ones)
    assert float(ones) == world
    members = world - 1 if world > 2 else world
    # gloo cannot send to itself; NCCL can, inside a batch.
    if rank < members and (world > 1 or place.type == "cuda"):
        exchange(rank, members, place)
    told: list[int] = [-1] * world
    dist.all_gather_object(told, rank)
    assert told == list(range(world)), "values on the CPU go over gloo beside it"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
