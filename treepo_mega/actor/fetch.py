"""Tokens of a step from the ranks whose engines sampled them to the ranks that train them.

    drafts = [Draft(batch, dealt), ...]              # from structure alone, the same on every rank
    batches = fetch(drafts, trees, timeout_s=600)    # whose own tokens can be read

Every rank knows who needs what (`tree/stretches.py`), so parcels go out without a request: one from each home to each
replica that trains some of its trees, and there from rank to rank. A token costs a rank that needs it 8 bytes (int32
and fp32; 12 where a logprob is not exact in fp32), and others nothing. A rank holds what it sends and what it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core import parallel_state as ps

from treepo_mega.runtime import dist
from treepo_mega.runtime.parcels import Incoming, chain, exchange, seal
from treepo_mega.tree.deal import Dealt
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch
from treepo_mega.tree.segments import Floats, Ints
from treepo_mega.tree.stretches import EVERYWHERE, Deliveries, Stretches, wanted


@dataclass(slots=True)
class Draft:
    """One optimizer step, dealt but not laid out."""

    trees: list[Tree]
    """Those of the step, in the order that its segments count tokens in."""
    batch: Batch
    dealt: Dealt


def fetch(drafts: Sequence[Draft], trees: Sequence[Tree], *, timeout_s: float) -> list[Batch]:
    """The batches of `drafts`, with the tokens of the pieces that this rank's replica trains.

    `trees`: those of the rollout, by the numbers that `Segments.prompt` gives them. Collective over all ranks, unless
    all trees are everywhere. Raises RankLost and PackedError, which name the rank that is late or sent damage.
    """
    homes = np.array([EVERYWHERE if tree.home is None else tree.home for tree in trees], np.int64)
    if (homes == EVERYWHERE).all():
        return [draft.batch for draft in drafts]
    deliveries = Deliveries([wanted(draft.batch.segments, draft.dealt, homes) for draft in drafts])
    own = [Stretches.of(draft.trees) for draft in drafts]
    held = deliver(deliveries, own, replicas(), timeout_s=timeout_s)
    return [
        replace(draft.batch, segments=stretches.furnish(draft.batch.segments))
        for draft, stretches in zip(drafts, held, strict=True)
    ]


def deliver(
    deliveries: Deliveries, own: Sequence[Stretches], replica_of_rank: Sequence[int], *, timeout_s: float
) -> list[Stretches]:
    """By optimizer step, what this rank's replica needs; `own` is what this rank holds. Collective over all ranks.

    A parcel goes to one rank of a replica, and from each of its ranks to the next (`parcels.chain`): at home a token
    is sent once a replica, however many ranks hold the model together.
    """
    rank = dist.rank()
    replica = replica_of_rank[rank]
    sizes = deliveries.tokens_between(max(replica_of_rank) + 1, dist.world_size())
    mine = {int(to): deliveries.contents(own, int(to), rank) for to in np.flatnonzero(sizes[:, rank])}
    # Agreed before anything is sent: both sides then know the bytes of every parcel.
    wide = dist.max_over_ranks({"wide": float(any(map(_is_wide, mine.values())))})["wide"]
    kind = np.dtype("<f8" if wide else "<f4")
    ranks_of = [[other for other, to in enumerate(replica_of_rank) if to == each] for each in range(len(sizes))]
    first_hops: dict[int, torch.Tensor] = {}
    for to, (tokens, logprobs) in mine.items():
        # At home, the chain's first rank may be this one.
        targets = [other for other in chain(rank, ranks_of[to])[:2] if other != rank][:1]
        first_hops |= {target: seal(tokens.astype("<i4"), logprobs.astype(kind)) for target in targets}
    incoming = [
        hop(int(home), rank, ranks_of[replica], int(sizes[replica, home]) * (4 + kind.itemsize))
        for home in np.flatnonzero(sizes[replica])
        if home != rank
    ]
    arrived = exchange(first_hops, incoming, what="the tokens of the step", timeout_s=timeout_s)
    parcels = {home: contents_of(body, kind) for home, body in arrived.items()}
    if replica in mine:
        parcels[rank] = mine[replica]
    parcels[EVERYWHERE] = deliveries.contents(own, replica, EVERYWHERE)
    return deliveries.assemble(replica, parcels)


def hop(home: int, rank: int, ranks: Sequence[int], size: int) -> Incoming:
    """How a parcel of `home` for the replica `ranks` comes to `rank`, one of them, and where it goes from there."""
    order = chain(home, ranks)
    place = order.index(rank)
    via = order[place - 1] if place else home
    return Incoming(home, via, size, order[place + 1] if place + 1 < len(order) else None)


def replicas() -> list[int]:
    """The data-parallel rank of every rank. Collective over all ranks."""
    return dist.gather_objects(ps.get_data_parallel_rank())


def _is_wide(contents: tuple[Ints, Floats]) -> bool:
    """Whether a logprob is not exact in fp32, as an engine's are."""
    logprobs = contents[1]
    return not np.array_equal(logprobs.astype(np.float32).astype(np.float64), logprobs)


def contents_of(body: memoryview, kind: np.dtype) -> tuple[Ints, Floats]:
    """Tokens and logprobs of a parcel."""
    count = len(body) // (4 + kind.itemsize)
    tokens = np.frombuffer(body, "<i4", count).astype(np.int64)
    return tokens, np.frombuffer(body, kind, count, 4 * count).astype(np.float64)
