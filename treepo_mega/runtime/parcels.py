"""Bytes from rank to rank whose sizes both sides know: point to point, checksummed, under a deadline.

    arrived = exchange({3: seal(one, two)}, [Incoming(origin=0, via=0, size=4096)], what="tokens", timeout_s=600)
    arrived[0]                          # the 4096 bytes that rank 0 sent, as a memoryview

A rank that neither sends nor receives does nothing: no padding, no round of sizes, no collective. A parcel is a header
(magic, CRC-32, bytes of the body) and its body. What many ranks need goes through them one after the other (`chain`):
each receives it once and sends it at most once. A rank holds what it sends and what it receives. Messages go through
gloo, on the CPU.
"""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from treepo_mega.runtime import dist
from treepo_mega.runtime.packed import PackedError, pack, unpack

MAGIC = b"TPP1"
HEADER = struct.Struct("<4sIQ")
"""Magic, checksum of the body, its bytes."""


def seal(*arrays: np.ndarray) -> torch.Tensor:
    """A parcel whose body is the bytes of `arrays`, one after the other; uint8 [HEADER.size + bytes]."""
    size = sum(array.nbytes for array in arrays)
    parcel = np.empty(HEADER.size + size, np.uint8)
    at = HEADER.size
    for array in arrays:
        parcel[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at += array.nbytes
    header = HEADER.pack(MAGIC, zlib.crc32(parcel[HEADER.size :].data), size)
    parcel[: HEADER.size] = np.frombuffer(header, np.uint8)
    return torch.from_numpy(parcel)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A parcel that this rank is to get: from `via`, who has it from `origin`; it then passes it on to `then`, if any.

    `size`: bytes of its body.
    """

    origin: int
    via: int
    size: int
    then: int | None = None


def exchange(
    parcels: Mapping[int, torch.Tensor], incoming: Sequence[Incoming], *, what: str, timeout_s: float
) -> dict[int, memoryview]:
    """Send a parcel of `seal` to each rank of `parcels`, pass on what is `incoming`; the bodies of that, by origin.

    Ranks that pass parcels on must list them in one order of origins, so that none waits for another in a ring. Raises
    RankLost, which names the rank and `what` was waited for, and PackedError for a damaged parcel, which names its
    origin and the rank it came through.
    """
    group = dist.cpu_group()
    ends_at = time.monotonic() + timeout_s
    me = dist.rank()
    inbox = {}
    receiving = {}
    sending = []
    # Of a pair of ranks, parcels are told apart by their origin, which is the message's tag.
    for one in incoming:
        inbox[one.origin] = torch.empty(HEADER.size + one.size, dtype=torch.uint8)
        with _named(f"{what}{_way(one)}", timeout_s):
            receiving[one.origin] = torch_dist.irecv(inbox[one.origin], one.via, group, tag=one.origin)
    for target, parcel in parcels.items():
        with _named(f"rank {target} to take {what}", timeout_s):
            sending.append((target, torch_dist.isend(parcel, target, group, tag=me)))
    arrived = {}
    for one in incoming:
        with _named(f"{what}{_way(one)}", timeout_s):
            _wait(receiving[one.origin], ends_at)
        arrived[one.origin] = _body(inbox[one.origin], one, what)
        if one.then is not None:
            with _named(f"rank {one.then} to take {what}", timeout_s):
                sending.append((one.then, torch_dist.isend(inbox[one.origin], one.then, group, tag=one.origin)))
    for target, work in sending:
        with _named(f"rank {target} to take {what}", timeout_s):
            _wait(work, ends_at)
    return arrived


def _way(one: Incoming) -> str:
    through = "" if one.via == one.origin else f", through rank {one.via}"
    return f" from rank {one.origin}{through}"


def chain(origin: int, ranks: Sequence[int]) -> list[int]:
    """The order in which a parcel of `origin` passes through `ranks`: each sends it once, however many there are.

    `origin` comes first if it is among them; else where the chain begins depends on it, so that the work is spread.

    >>> chain(6, [4, 5, 6, 7]), chain(9, [4, 5, 6, 7])
    ([6, 7, 4, 5], [5, 6, 7, 4])
    """
    first = ranks.index(origin) if origin in ranks else origin % len(ranks)
    return [*ranks[first:], *ranks[:first]]


def tell_main(value: Any = None, *, what: str, timeout_s: float) -> dict[int, Any]:
    """What other ranks say to rank 0, by rank, there; nothing elsewhere. None: this rank has nothing to say.

    `value` as for `packed.pack`. Collective over all ranks, which tell their sizes (8 bytes each) first. Raises as
    `exchange` does.
    """
    data = np.zeros(0, np.uint8) if value is None else np.frombuffer(pack(value), np.uint8)
    sizes = dist.sizes_of_ranks(data.nbytes)
    if dist.is_main():
        incoming = [Incoming(speaker, speaker, size) for speaker, size in enumerate(sizes) if size and speaker]
        arrived = exchange({}, incoming, what=what, timeout_s=timeout_s)
        return {speaker: unpack(body) for speaker, body in arrived.items()}
    if value is not None:
        exchange({0: seal(data)}, [], what=what, timeout_s=timeout_s)
    return {}


def _wait(work: Any, ends_at: float) -> None:
    # At least a moment: what has arrived already must not fail for the ranks before it.
    work.wait(timedelta(seconds=max(ends_at - time.monotonic(), 0.05)))


@contextlib.contextmanager
def _named(awaited: str, timeout_s: float) -> Iterator[None]:
    """Errors of torch.distributed as RankLost, which names whom this rank waited for."""
    try:
        yield
    except RuntimeError as e:
        raise dist.RankLost(
            f"rank {dist.rank()} waited for {awaited} (deadline {timeout_s:.0f} s). That rank died or is stuck; its "
            f"own output says why. ({e})"
        ) from e


def _body(parcel: torch.Tensor, one: Incoming, what: str) -> memoryview:
    """The body of an arrived parcel. Raises PackedError."""
    data = parcel.numpy().data
    magic, checksum, size = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    if magic != MAGIC or size != len(body):
        wrong = f"it begins with {magic!r} and says {size} bytes, expected {MAGIC!r} and {len(body)}"
    elif (found := zlib.crc32(body)) != checksum:
        wrong = f"checksum {found:08x}, expected {checksum:08x}, of {size} bytes"
    else:
        return body
    raise PackedError(
        f"{what}{_way(one)} arrived damaged at rank {dist.rank()}: {wrong}. Start again; if it comes back, look at the "
        "network and the memory of these machines"
    )
