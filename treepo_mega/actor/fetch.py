"""Tokens of a step from the ranks whose engines sampled them to the ranks that train them.

    drafts = [Draft(batch, dealt), ...]              # from structure alone, the same on every rank
    batches = fetch(drafts, trees, timeout_s=600)    # whose own tokens can be read

Every rank knows who needs what (`tree/stretches.py`), so parcels go out without a request: one from each home to each
replica that trains some of its trees, and there from rank to rank. A token costs a rank that needs it 8 bytes (int32
and fp32; 12 where a logprob is not exact in fp32), and others nothing. A rank holds what it sends and what it trains.
Where trees carry the engine's experts (`rollout.routing_replay`), a token costs a byte a layer and expert more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as ps

from treepo_mega.runtime import dist
from treepo_mega.runtime.parcels import Incoming, chain, exchange, seal
from treepo_mega.tree.deal import Dealt
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch
from treepo_mega.tree.routing import ExpertIds, no_experts, widened
from treepo_mega.tree.segments import Floats
from treepo_mega.tree.stretches import EVERYWHERE, Contents, Deliveries, Stretches, wanted


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
    layout = _agree(mine.values())
    ranks_of = [[other for other, to in enumerate(replica_of_rank) if to == each] for each in range(len(sizes))]
    first_hops: dict[int, torch.Tensor] = {}
    for to, contents in mine.items():
        # At home, the chain's first rank may be this one.
        targets = [other for other in chain(rank, ranks_of[to])[:2] if other != rank][:1]
        first_hops |= {target: seal(*layout.arrays(contents)) for target in targets}
    incoming = [
        hop(int(home), rank, ranks_of[replica], int(sizes[replica, home]) * layout.bytes_a_token)
        for home in np.flatnonzero(sizes[replica])
        if home != rank
    ]
    arrived = exchange(first_hops, incoming, what="the tokens of the step", timeout_s=timeout_s)
    parcels = {home: layout.contents(body) for home, body in arrived.items()}
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


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tokens of a step travel; the same on all ranks, so that both sides know the bytes of every parcel."""

    logprobs: np.dtype[Any]
    experts: ExpertIds
    """[0, layers, top_k], for its shape and type; [0, 0, 0] where no tree carries experts."""

    @property
    def bytes_a_token(self) -> int:
        """Of one token's id, logprob and experts."""
        return 4 + self.logprobs.itemsize + math.prod(self.experts.shape[1:]) * self.experts.itemsize

    def arrays(self, contents: Contents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What of `contents` a parcel holds, in this order."""
        experts = widened(contents.experts, self.experts)
        little = experts.astype(experts.dtype.newbyteorder("<"))
        return contents.tokens.astype("<i4"), contents.logprobs.astype(self.logprobs), little.reshape(-1)

    def contents(self, body: memoryview) -> Contents:
        """The inverse of `arrays`."""
        count = len(body) // self.bytes_a_token
        tokens = np.frombuffer(body, "<i4", count).astype(np.int64)
        logprobs = np.frombuffer(body, self.logprobs, count, 4 * count).astype(np.float64)
        shape = (count, *self.experts.shape[1:])
        if not math.prod(shape):
            return Contents(tokens, logprobs, no_experts(count))
        begin = (4 + self.logprobs.itemsize) * count
        experts = np.frombuffer(body, self.experts.dtype.newbyteorder("<"), math.prod(shape), begin)
        return Contents(tokens, logprobs, experts.astype(self.experts.dtype).reshape(shape))


def _agree(mine: Iterable[Contents]) -> Layout:
    """The layout that holds what every rank sends. Collective over all ranks."""
    wide = False
    told = {"layers": 0.0, "top_k": 0.0, "itemsize": 1.0}
    for contents in mine:
        wide |= _is_wide(contents.logprobs)
        experts = contents.experts
        # A rank whose trees carry no experts must not decide.
        here = {"layers": experts.shape[1], "top_k": experts.shape[2], "itemsize": experts.itemsize}
        told = {name: max(value, float(here[name])) for name, value in told.items()}
    agreed = dist.max_over_ranks(told | {"wide": float(wide)})
    ids = np.zeros((0, int(agreed["layers"]), int(agreed["top_k"])), f"u{int(agreed['itemsize'])}")
    return Layout(np.dtype("<f8" if agreed["wide"] else "<f4"), ids)


def _is_wide(logprobs: Floats) -> bool:
    """Whether a logprob is not exact in fp32, as an engine's are."""
    return not np.array_equal(logprobs.astype(np.float32).astype(np.float64), logprobs)
