"""One rank of the doctor's all-reduce: `python -m treepo_mega.doctor.exchange DIRECTORY HOST,HOST,... HOST ...`.

A process of its own, because it imports torch, takes a device, and may hang in a collective: `reduce.py` starts it,
reads its last word and ends it. All ranks sum one tensor, whose every element is known. Then neighbours in the list of
hosts send each other a tensor there and back, two nodes at a time: of a sum nobody can tell who was slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from treepo_mega.runtime.device import select, wait_for
from treepo_mega.runtime.files import atomic_file

REPEATS = 5
POLL_S = 0.05
BASE = 8
"""Elements are below it, so that a sum over 2,000 ranks is exact in fp32."""


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours in a ring of `nodes`; no node is in two pairs of a round.

    >>> rounds(2), rounds(5)
    ([[(0, 1)]], [[(0, 1), (2, 3)], [(1, 2), (3, 4)], [(4, 0)]])
    """
    pairs = [(first, first + 1) for first in range(nodes - 1)]
    ring = [pairs[0::2], pairs[1::2], [(nodes - 1, 0)] if nodes > 2 else []]
    return [each for each in ring if each]


def pattern(count: int, device: torch.device) -> torch.Tensor:
    """[count] fp32: 0, 1, ..., 7, 0, 1, ...: a part that arrives in another's place is seen."""
    return torch.arange(count, device=device).remainder(BASE).float()


def all_reduce(count: int, rank: int, world: int, device: torch.device) -> tuple[int, float]:
    """(elements that are wrong, median seconds) of summing [count] fp32 over all ranks. Collective."""
    base = pattern(count, device)
    seconds = []
    wrong = 0
    for _ in range(REPEATS + 1):
        mine = base * (rank + 1)
        wait_for(device)
        started = time.perf_counter()
        dist.all_reduce(mine)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
        wrong += int((mine != base * (world * (world + 1) // 2)).sum())
    # The first one opens the connections.
    return wrong, statistics.median(seconds[1:])


def ping(peer: int, count: int, device: torch.device, *, first: bool) -> float:
    """Median seconds of sending [count] fp32 to the rank `peer` and back. Collective over the two."""
    mine = pattern(count, device)
    seconds = []
    for _ in range(REPEATS + 1):
        wait_for(device)
        started = time.perf_counter()
        if first:
            dist.send(mine, peer)
            dist.recv(mine, peer)
        else:
            dist.recv(mine, peer)
            dist.send(mine, peer)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    # As above. One try alone would take a moment in which the host did something else for a slow link.
    return statistics.median(seconds[1:])


def _store(directory: Path, host: str, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Rank 0's store, whose address the shared directory tells."""
    told = directory / "store.address"
    if rank == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        with atomic_file(told) as file:
            json.dump({"host": host, "port": store.port}, file)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not told.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{told} did not come in {timeout.total_seconds():.0f} s")
        time.sleep(POLL_S)
    address = json.loads(told.read_text(encoding="utf-8"))
    return dist.TCPStore(address["host"], address["port"], world, is_master=False, timeout=timeout)


def main() -> None:
    """Join, sum, exchange, write `<host>.reduce`; the last line printed says what it was doing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("hosts", help="all hosts, with commas between, in one order everywhere")
    parser.add_argument("host")
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--local-world", type=int, required=True)
    parser.add_argument("--backend", choices=["gloo", "nccl"], required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    args = parser.parse_args()
    hosts = args.hosts.split(",")
    node = hosts.index(args.host)
    rank = node * args.local_world + args.local_rank
    world = len(hosts) * args.local_world
    timeout = timedelta(seconds=args.timeout)
    device = torch.device("cuda", args.local_rank) if args.backend == "nccl" else torch.device("cpu")
    select(device)

    print("joining the other ranks", flush=True)
    store = _store(args.directory, args.host, rank, world, timeout)
    dist.init_process_group(args.backend, store=store, rank=rank, world_size=world, timeout=timeout)
    print(f"summing over {world} ranks", flush=True)
    count = args.bytes // 4
    wrong, seconds = all_reduce(count, rank, world, device)
    rates: dict[str, float] = {}
    for number, pairs in enumerate(rounds(len(hosts))):
        dist.barrier()
        for first, second in pairs:
            if node in (first, second) and args.local_rank == 0:
                other = second if node == first else first
                print(f"exchanging with {hosts[other]}, round {number}", flush=True)
                took = ping(other * args.local_world, count, device, first=node == first)
                rates[hosts[other]] = 2 * 4 * count / took / 1e9
    dist.barrier()
    about: dict[str, Any] = {"wrong": wrong, "seconds": seconds, "bytes": 4 * count, "world": world, "rates": rates}
    print(json.dumps(about), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
