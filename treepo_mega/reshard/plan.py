"""Who sends what to whom: the fewest bytes from one layout of the weights to another. Pure.

    cluster = Cluster(world_size=512, ranks_per_node=8)
    plan = plan_reshard(mcore_side(spec, grid, 512), vllm_side(spec, 8, 512), cluster, itemsize=2)
    plan.traffic()                       # bytes by link, per rank, against the lower bound
    plan.for_rank(17)                    # what that rank copies, sends and receives, round by round

Both sides are boxes of HF tensors (`sides.py`). Their intersections are the copies. All copies that the same
coordinates hold and one coordinate wants form a *route*; a route is planned for all its ranks at once, which is
why 4,096 ranks cost little more than eight. Every destination rank takes a route from exactly one source: itself if
it holds the bytes, else a holder on its node, else one elsewhere, always the one with the least to send so far on
that kind of link. So no byte moves that its receiver already had, and none moves twice: the sum is the lower bound.

Time is divided into rounds: in round i of R every source sends what lies in the i-th part of its own parameters.
Stages therefore progress side by side. R is the smallest number for which nobody holds more than `bucket_bytes`
of one round in buffers; two rounds are in flight, so buffers take at most twice that.

The plan depends on the configuration alone: ranks make it without talking, and `digest` is equal on all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from treepo_mega.modelspec.mcore_layout import Block, Box, LayoutError
from treepo_mega.reshard.sides import ChunkLayouts, Ranks, Side

LINKS = ("local", "node", "network")
"""Nearest first: within the rank's own memory, between ranks of a node, between nodes."""


class PlanError(LayoutError):
    """No plan exists: the message names the tensor that nobody holds, or the bucket that is too small."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`world_size` ranks, the first `ranks_per_node` of them on the first node, and so on."""

    world_size: int
    ranks_per_node: int

    def node(self, ranks: Ranks) -> Ranks:
        """The node of each rank."""
        return ranks // self.ranks_per_node


@dataclass(frozen=True, slots=True)
class Copy:
    """`box` of HF tensor `hf_name`: from the holder's block `held` to `target_box` of the wanted parameter.

    `start` and `row` place it in the holder's parameters: elements before `held`, and elements of a row of `held`.
    """

    hf_name: str
    box: Box
    held: Box
    chunk: int
    param: str
    target_box: Box
    start: int
    row: int

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the box."""
        return tuple(stop - start for start, stop in self.box)

    def rows(self, start: int, stop: int) -> Copy:
        """Rows [start, stop) of the HF tensor only."""
        # A stacked destination (experts) has one dimension more, in front.
        extra = len(self.target_box) - len(self.box)
        shift = self.target_box[extra][0] - self.box[0][0]
        target = (*self.target_box[:extra], (start + shift, stop + shift), *self.target_box[extra + 1 :])
        box = ((start, stop), *self.box[1:])
        return Copy(self.hf_name, box, self.held, self.chunk, self.param, target, self.start, self.row)


@dataclass(slots=True)
class Route:
    """Copies from any rank of coordinates `holders` to each rank of coordinate `wanted`.

    `sources[i]` serves `targets[i]`.
    `rounds[i]` are the copies of round i, cut where a round ends; `elements[i]` their sizes.
    """

    wanted: int
    holders: tuple[int, ...]
    copies: list[Copy]
    numel: int = 0
    targets: Ranks = field(default_factory=lambda: np.empty(0, np.int64))
    sources: Ranks = field(default_factory=lambda: np.empty(0, np.int64))
    rounds: dict[int, list[Copy]] = field(default_factory=dict)
    elements: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a plan moves. Bytes; `by_link` sums over all ranks, `*_max` are of the busiest rank.

    `bound_by_link`: what cannot be avoided with direct transfers: bytes that a rank wants and does not hold (node
    plus network), and bytes that nobody on its node holds (network).
    """

    by_link: dict[str, int]
    bound: int
    bound_network: int
    sent_max: dict[str, int]
    received_max: dict[str, int]
    wanted_max: int
    buffer_max: int
    rounds: int

    @property
    def moved(self) -> int:
        """Bytes that cross from one rank to another."""
        return self.by_link["node"] + self.by_link["network"]


@dataclass(frozen=True, slots=True)
class Parcel:
    """One contiguous message of a round: `copies` one after another from `offset` (elements) of `source`'s buffer."""

    source: int
    targets: tuple[int, ...]
    offset: int
    copies: tuple[Copy, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(copy.numel for copy in self.copies)


@dataclass(frozen=True, slots=True)
class RankRound:
    """One rank's part of a round."""

    local: tuple[Copy, ...]
    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """All routes; see the module's page. `round_count` R; `itemsize` bytes per element on the way.

    `buffer_bytes`: the most that a rank sends plus receives in one round. `holder_ranks`: ranks that hold what a
    route's coordinates hold.
    """

    cluster: Cluster
    itemsize: int
    bucket_bytes: int
    routes: tuple[Route, ...]
    round_count: int
    buffer_bytes: int
    holder_ranks: dict[tuple[int, ...], Ranks] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A fingerprint of every assignment and cut."""
        fingerprint = hashlib.sha256(f"{self.cluster} {self.itemsize} {self.round_count}".encode())
        for route in self.routes:
            fingerprint.update(f"{route.wanted} {route.holders} {route.numel} {route.copies[0]}".encode())
            for array in (route.targets, route.sources, route.elements):
                fingerprint.update(array.tobytes())
        return fingerprint.hexdigest()

    def traffic(self) -> Traffic:
        """Bytes by link, per rank, and the lower bound."""
        world = self.cluster.world_size
        sent = {link: np.zeros(world, np.int64) for link in LINKS}
        received = {link: np.zeros(world, np.int64) for link in LINKS}
        bound = 0
        bound_network = 0
        for route in self.routes:
            size = route.numel * self.itemsize
            for link, mask in zip(LINKS, self._links(route), strict=True):
                np.add.at(sent[link], route.sources[mask], size)
                np.add.at(received[link], route.targets[mask], size)
            holders = self.holder_ranks[route.holders]
            holder_nodes = self.cluster.node(holders)
            bound += size * int((~np.isin(route.targets, holders)).sum())
            bound_network += size * int((~np.isin(self.cluster.node(route.targets), holder_nodes)).sum())
        wanted = sum(received[link] for link in LINKS)
        return Traffic(
            by_link={link: int(received[link].sum()) for link in LINKS},
            bound=bound,
            bound_network=bound_network,
            sent_max={link: int(sent[link].max()) for link in LINKS},
            received_max={link: int(received[link].max()) for link in LINKS},
            wanted_max=int(np.max(wanted)),
            buffer_max=self.buffer_bytes,
            rounds=self.round_count,
        )

    def _links(self, route: Route) -> tuple[NDArray[np.bool_], ...]:
        """Which targets of a route take it over each of LINKS."""
        local = route.sources == route.targets
        near = self.cluster.node(route.sources) == self.cluster.node(route.targets)
        return local, near & ~local, ~near

    def for_rank(self, rank: int) -> list[RankRound]:
        """What `rank` does in each round. A parcel's offset is that in its source's buffer of the round."""
        served = self._served()
        source_of: dict[int, int] = {}
        for number, route in enumerate(self.routes):
            if rank in route.targets:
                source_of[number] = int(route.sources[np.flatnonzero(route.targets == rank)[0]])
        out = []
        for turn in range(self.round_count):
            local = [
                copy
                for number, source in source_of.items()
                if source == rank
                for copy in self.routes[number].rounds.get(turn, ())
            ]
            # A source's parcels lie one after another, so all of them are laid out to know where one begins.
            parcels = {
                source: self._parcels(source, turn, served.get(source, ())) for source in {rank, *source_of.values()}
            }
            receives = [
                parcels[source][number]
                for number, source in source_of.items()
                if source != rank and number in parcels[source]
            ]
            out.append(RankRound(tuple(local), tuple(parcels[rank].values()), tuple(receives)))
        return out

    def _served(self) -> dict[int, list[int]]:
        """The routes, by number, that each source serves to another rank."""
        served: dict[int, list[int]] = {}
        for number, route in enumerate(self.routes):
            for source in np.unique(route.sources[route.sources != route.targets]).tolist():
                served.setdefault(source, []).append(number)
        return served

    def _parcels(self, source: int, turn: int, numbers: Sequence[int]) -> dict[int, Parcel]:
        """The parcels of a source in round `turn`, by the number of their route."""
        out: dict[int, Parcel] = {}
        offset = 0
        for number in numbers:
            route = self.routes[number]
            if copies := route.rounds.get(turn):
                targets = route.targets[(route.sources == source) & (route.targets != source)]
                out[number] = Parcel(source, tuple(targets.tolist()), offset, tuple(copies))
                offset += int(route.elements[turn])
        return out


def plan_reshard(
    source: Side, target: Side, cluster: Cluster, *, itemsize: int, bucket_bytes: int = 64 << 20
) -> ReshardPlan:
    """The plan from `source` to `target`.

    Raises PlanError when some wanted element is held nowhere, and when a single row exceeds a bucket.
    """
    if bucket_bytes < itemsize:
        raise PlanError(f"bucket of {bucket_bytes} bytes; expected at least {itemsize}")
    routes = _routes(source, target)
    holder_ranks = {route.holders: np.flatnonzero(np.isin(source.of_rank, route.holders)) for route in routes}
    _assign(routes, holder_ranks, target, cluster)
    routes = [route for route in routes if route.targets.size]
    totals = [_elements(chunks) for chunks in source.layouts]
    most_rounds = max((copy.numel for route in routes for copy in route.copies), default=1) * len(routes) + 1
    count = _first_guess(routes, cluster.world_size, itemsize, bucket_bytes)
    for _ in range(40):
        for route in routes:
            _cut(route, totals[route.holders[0]], count)
        peak = _peak(routes, cluster.world_size, count) * itemsize
        if peak <= bucket_bytes:
            return ReshardPlan(cluster, itemsize, bucket_bytes, tuple(routes), count, peak, holder_ranks)
        if count > most_rounds:
            break
        count = max(count + 1, -(-count * peak // bucket_bytes))
    raise PlanError(f"a bucket of {bucket_bytes} bytes cannot hold what must move together ({peak} bytes); use more")


def _elements(chunks: ChunkLayouts) -> int:
    """Elements of the model that a coordinate holds."""
    return sum(block.numel for params in chunks for param in params.values() for block in param.blocks)


def _routes(source: Side, target: Side) -> list[Route]:
    """Intersections of what is held and wanted, by (coordinate that wants, coordinates that hold)."""
    held = _held(source)
    routes: dict[tuple[int, tuple[int, ...]], Route] = {}
    for wanted, chunks in enumerate(target.layouts):
        for chunk, params in enumerate(chunks):
            for name, param in params.items():
                for block in param.blocks:
                    found = 0
                    for box, (holders, start, row) in held.get(block.hf_name, {}).items():
                        copy = _intersect(block, box, chunk, name, start, row)
                        if copy is not None:
                            key = (wanted, holders)
                            routes.setdefault(key, Route(wanted, holders, [])).copies.append(copy)
                            found += copy.numel
                    if found != block.numel:
                        raise PlanError(
                            f"{block.hf_name} {list(block.hf_slice)}: {found} of {block.numel} elements are held by "
                            f"the source, but {name} wants all of them exactly once"
                        )
    for route in routes.values():
        route.numel = sum(copy.numel for copy in route.copies)
    return list(routes.values())


Held = dict[Box, tuple[tuple[int, ...], int, int]]


def _held(source: Side) -> dict[str, Held]:
    """hf_name -> block -> (coordinates that hold it, elements before it in the first of them, elements of its row)."""
    places: dict[str, dict[Box, tuple[list[int], int, int]]] = {}
    for coordinate, chunks in enumerate(source.layouts):
        start = 0
        for params in chunks:
            for param in params.values():
                for block in param.blocks:
                    boxes = places.setdefault(block.hf_name, {})
                    row = block.numel // max(1, block.shape[0])
                    holders = boxes.setdefault(block.hf_slice, ([], start, row))[0]
                    # Two parameters of a coordinate may hold the block (a tied output layer): it counts once.
                    if coordinate not in holders:
                        holders.append(coordinate)
                    start += block.numel
    return {
        name: {box: (tuple(holders), start, row) for box, (holders, start, row) in boxes.items()}
        for name, boxes in places.items()
    }


def _intersect(block: Block, box: Box, chunk: int, name: str, start: int, row: int) -> Copy | None:
    """The part of a wanted block that lies in a held one."""
    both = tuple(
        (max(wanted_from, held_from), min(wanted_to, held_to))
        for (wanted_from, wanted_to), (held_from, held_to) in zip(block.hf_slice, box, strict=True)
    )
    if any(first >= last for first, last in both):
        return None
    extra = len(block.local_slice) - len(block.hf_slice)
    target = tuple(
        (first - hf_from + local_from, last - hf_from + local_from)
        for (first, last), (hf_from, _), (local_from, _) in zip(
            both, block.hf_slice, block.local_slice[extra:], strict=True
        )
    )
    return Copy(block.hf_name, both, box, chunk, name, (*block.local_slice[:extra], *target), start, row)


def _assign(routes: list[Route], holder_ranks: dict[tuple[int, ...], Ranks], target: Side, cluster: Cluster) -> None:
    """Choose every target's source: itself, else its node's least loaded holder, else the least loaded elsewhere."""
    # Two loads: what a rank sends within its node does not use its network link.
    near_load = np.zeros(cluster.world_size, np.int64)
    far_load = np.zeros(cluster.world_size, np.int64)
    # Large routes first: the small ones even out what is left.
    for route in sorted(routes, key=lambda route: -route.numel):
        holders = holder_ranks[route.holders]
        route.targets = np.flatnonzero(target.of_rank == route.wanted)
        if route.targets.size and not holders.size:
            raise PlanError(f"{route.copies[0].hf_name}: no rank of this world holds it")
        route.sources = route.targets.copy()
        lacking = np.flatnonzero(~np.isin(route.targets, holders))
        nodes = cluster.node(route.targets[lacking])
        holder_nodes = cluster.node(holders)
        near = np.isin(nodes, holder_nodes)
        for node in np.unique(nodes[near]).tolist():
            _spread(route, lacking[nodes == node], holders[holder_nodes == node], near_load)
        if not near.all():
            _spread(route, lacking[~near], holders, far_load)


def _spread(route: Route, which: Ranks, candidates: Ranks, load: Ranks) -> None:
    """Deal the targets `which` out over the candidates, least loaded first."""
    # Stable: every rank makes this plan for itself, so equal loads must tie alike on all.
    order = candidates[np.argsort(load[candidates], kind="stable")]
    chosen = order[np.arange(which.size) % order.size]
    route.sources[which] = chosen
    np.add.at(load, chosen, route.numel)


def _first_guess(routes: list[Route], world: int, itemsize: int, bucket_bytes: int) -> int:
    """Rounds needed if everything could be cut evenly."""
    total = np.zeros(world, np.int64)
    for route in routes:
        moves = route.sources != route.targets
        # A source packs a route once, however many targets read it.
        total[np.unique(route.sources[moves])] += route.numel
        total[route.targets[moves]] += route.numel
    return max(1, -(-int(total.max(initial=0)) * itemsize // bucket_bytes))


def _cut(route: Route, total: int, count: int) -> None:
    """Deal the copies to `count` rounds by where they lie in the holder's `total` elements, cutting between rows."""
    route.rounds = {}
    route.elements = np.zeros(count, np.int64)
    for copy in route.copies:
        first, stop = copy.box[0]
        held_from = copy.held[0][0]
        while first < stop:
            place = copy.start + (first - held_from) * copy.row
            turn = place * count // total
            # The first row that begins in a later round.
            limit = -((-(turn + 1) * total) // count)
            last = min(stop, max(first + 1, held_from + -(-(limit - copy.start) // copy.row)))
            part = copy if (first, last) == copy.box[0] else copy.rows(first, last)
            route.rounds.setdefault(turn, []).append(part)
            route.elements[turn] += part.numel
            first = last


def _peak(routes: list[Route], world: int, count: int) -> int:
    """Most elements that a rank sends plus receives in one round."""
    held = np.zeros((world, count), np.int64)
    for route in routes:
        moves = route.sources != route.targets
        held[np.unique(route.sources[moves])] += route.elements
        held[route.targets[moves]] += route.elements
    return int(held.max(initial=0))
