"""Two ranks of test_dist.py: `dist_worker.py exchange|missing`."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed

from treepo_mega.runtime import dist
from treepo_mega.runtime.packed import PackedError
from treepo_mega.runtime.parcels import Incoming, seal, tell_main
from treepo_mega.runtime.parcels import exchange as exchange_parcels
from treepo_mega.runtime.signals import StopRequest


def exchange() -> None:
    """Collectives of plain values, and a stop request that reaches one rank only."""
    rank = dist.rank()
    mine = {"rank": rank, "text": "ü" * (rank * 1000), "list": list(range(rank))}
    told = dist.gather_objects(mine)
    assert told == [{"rank": r, "text": "ü" * (r * 1000), "list": list(range(r))} for r in range(2)], told
    assert dist.gather_objects(None if rank else [0.1]) == [[0.1], None]
    received: list[int] = []
    gather, broadcast = torch.distributed.all_gather, torch.distributed.broadcast
    torch.distributed.all_gather = lambda parts, own: (received.extend(p.nbytes for p in parts), gather(parts, own))[1]
    torch.distributed.broadcast = lambda part, src: (received.append(part.nbytes), broadcast(part, src))[1]
    long = ["x" * 300_000 if rank else None for rank in range(2)]
    assert dist.gather_objects(long[rank]) == long
    assert sum(received) < 301_000, "a rank with nothing to say adds no padding"
    torch.distributed.all_gather, torch.distributed.broadcast = gather, broadcast
    assert dist.sum_over_ranks({"b": rank + 1.0, "a": 1e-9}) == {"a": 2e-9, "b": 3.0}
    assert dist.max_over_ranks({"x": -float(rank)}) == {"x": 0.0}
    assert (dist.is_main(), dist.world_size()) == (rank == 0, 2)

    dist.require_agreement({"same": [0.1]}, "a plug-in")
    with pytest.raises(dist.RanksDisagree, match=r"^a plug-in gave other results on ranks \[1\] than on rank 0\."):
        dist.require_agreement([rank], "a plug-in")

    assert dist.tell_all() == {}
    (found,) = dist.tell_all(None if rank == 0 else {"columns": np.arange(90_000)}).items()
    assert found[0] == 1 and found[1]["columns"].tolist() == list(range(90_000))
    assert set(dist.tell_all([rank])) == {0, 1}
    parcel()

    stop = StopRequest().install()
    assert not stop.agreed()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.agreed() and stop.requested == (rank == 1)
    dist.barrier("the exchange", 30)


def parcel() -> None:
    """A parcel from rank 1 to rank 0; one that is damaged on its way; ranks that have nothing to say."""
    arrays = np.arange(5000, dtype=np.int32), np.linspace(-1, 0, 3000, dtype=np.float32)
    size = sum(array.nbytes for array in arrays)
    sends, expects = ({1: {0: seal(*arrays)}, 0: {}}, {0: [Incoming(1, 1, size)], 1: []})
    rank = dist.rank()
    arrived = exchange_parcels(sends[rank], expects[rank], what="tokens", timeout_s=30)
    assert {source: bytes(body) for source, body in arrived.items()} == (
        {} if rank else {1: b"".join(array.tobytes() for array in arrays)}
    )
    assert exchange_parcels({}, [], what="nothing", timeout_s=30) == {}
    assert tell_main([rank, "says"], what="words", timeout_s=30) == ({} if rank else {1: [1, "says"]})
    assert tell_main(what="nothing", timeout_s=30) == {}
    if rank:
        damaged = seal(*arrays)
        damaged[4321] ^= 1
        exchange_parcels({0: damaged}, [], what="tokens", timeout_s=30)
        return
    with pytest.raises(PackedError, match=r"^tokens from rank 1 arrived damaged at rank 0: checksum \w{8}, expected"):
        exchange_parcels({}, [Incoming(1, 1, size)], what="tokens", timeout_s=30)


def missing() -> None:
    """Rank 1 does not come; rank 0 says so, and about what."""
    if dist.rank() == 1:
        time.sleep(5)
        return
    try:
        dist.barrier("generation", 1.5)
    except dist.RankLost as e:
        print("MESSAGE", str(e).replace("\n", " "), flush=True)
    with pytest.raises(dist.RankLost, match=r"^rank 0 waited for the tokens from rank 1 \(deadline 1 s\)"):
        exchange_parcels({}, [Incoming(1, 1, 100)], what="the tokens", timeout_s=1)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    {"exchange": exchange, "missing": missing}[sys.argv[1]]()
    print(f"finished {dist.rank()}\n", end="", flush=True)
    dist.leave()
