"""Which wanted segments run now: as many as the KV cache and the batch hold, oldest trees first. Pure bookkeeping.

    room = Admission(blocks=1023, block_size=32, max_running=256)
    room.want(rank, key, path, lengths, tokens)     # a segment waits; rank: the order in which trees were begun
    for key in room.admit(): submit(key)            # those that fit now, in order
    room.finish(key)                                # its segment has arrived; its prefix stays booked
    room.settle(tree)                               # what the tree wants next is known: forget the rest of it
    room.hold(tree, spans)                          # all of it stays booked until the next call

A segment books the blocks that it can fill at most, and waits until they are free, so the engine never preempts. Full
blocks of the nodes above are booked once a tree, by reference count. `rollout/README.md` gives the reasons.

Nodes are named by their `path` (child indices from the root), which unlike their ids never changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treepo_mega.errors import TreepoError
from treepo_mega.rollout.idleness import Occupancy

Path = tuple[int, ...]
Key = tuple[int, Path]
"""(rank of the tree, path of the node)."""


class CacheTooSmall(TreepoError):
    """The KV cache does not hold a single path of the asked length; the message names the key to raise."""


@dataclass(slots=True)
class _Waiting:
    """`ends[d]`: tokens up to and with the node at depth d of the path above the wanted one."""

    ends: list[int]
    tokens: int


class Admission:
    """See the module docstring. `blocks`: of the whole cache; `max_running`: segments in one batch."""

    def __init__(self, blocks: int, block_size: int, max_running: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.max_running = max_running
        self.used = 0
        """Blocks booked now."""
        self.occupancy = Occupancy(0, blocked=False)
        """Of the coming engine step, as the last `admit` left it."""
        self.running: set[Key] = set()
        self._waiting: list[Key] = []
        self._asked: dict[Key, _Waiting] = {}
        # Blocks of a running segment alone.
        self._own: dict[Key, int] = {}
        # Node -> [blocks, references]: siblings share what is above them.
        self._shared: dict[Key, list[int]] = {}
        # Tree -> arrived segments whose prefixes are still booked.
        self._done: dict[int, list[Key]] = {}
        # Tree -> nodes that stay booked as they are, and blocks of ended paths that are no nodes to start from yet.
        self._held: dict[int, list[Key]] = {}
        self._kept: dict[int, int] = {}

    @property
    def idle(self) -> bool:
        """True when nothing waits and the batch has room: a new tree may begin."""
        return not self._waiting and len(self.running) < self.max_running

    def want(self, rank: int, path: Path, lengths: Sequence[int], tokens: int) -> None:
        """A segment of at most `tokens` tokens waits, at `path` of tree `rank`; `lengths`: the nodes above, root first.

        Raises CacheTooSmall when it alone is more than the cache holds.
        """
        ends = [sum(lengths[: depth + 1]) for depth in range(len(lengths))]
        key = (rank, path)
        alone = -(-(ends[-1] + tokens) // self.block_size)
        if alone > self.blocks:
            raise CacheTooSmall(
                f"a path of {ends[-1] + tokens} tokens needs {alone} KV blocks of {self.block_size}, the engine has "
                f"{self.blocks}: raise rollout.engine.kv_cache_memory_mb (gpu_memory_utilization on a GPU)"
            )
        self._asked[key] = _Waiting(ends, tokens)
        # Ordered by (rank, path): earlier trees go first, so fewer are open and more of their prefixes stay cached.
        heapq.heappush(self._waiting, key)

    def admit(self) -> list[Key]:
        """Book and return what may run now, in order. Never empty while something waits and nothing runs."""
        out = []
        # Strictly in order: a small segment that overtook a large one could keep it waiting for ever.
        while self._waiting and len(self.running) < self.max_running:
            key = self._waiting[0]
            if not self.running and self.used + self._need(key) > self.blocks:
                # What is held only saves computing it again: many trees that hold theirs would run one by one.
                for rank in [*self._held, *self._kept]:
                    self.hold(rank, {})
            need = self._need(key)
            # When nothing runs, booked prefixes only wait to be used: they may be evicted rather than block.
            if self.used + need > self.blocks and self.running:
                break
            heapq.heappop(self._waiting)
            self._book(key)
            out.append(key)
        self.occupancy = Occupancy(len(self.running), bool(self._waiting) and len(self.running) < self.max_running)
        return out

    def grow(self, rank: int, path: Path, tokens: int) -> None:
        """A running segment became a run of `tokens` tokens so far: it books more. It is not asked to wait."""
        key = (rank, path)
        self._asked[key].tokens = tokens
        # Not asked to wait: it would keep what it holds, and two such runs could wait for each other for ever.
        more = self._alone(key) - self._own[key]
        self._own[key] += more
        self.used += more

    def finish(self, rank: int, path: Path, *, keep: bool = False) -> None:
        """A running segment has arrived: its own blocks are free, its prefix stays booked until `settle`.

        `keep`: its own blocks stay booked until `hold`.
        """
        key = (rank, path)
        self.running.remove(key)
        own = self._own.pop(key)
        if keep:
            self._kept[rank] = self._kept.get(rank, 0) + own
        else:
            self.used -= own
        # Until the tree has said what it wants next, others would take the cache just before it is used again.
        self._done.setdefault(rank, []).append(key)

    def settle(self, rank: int) -> None:
        """Tree `rank` has said what it wants next, or is done: release the prefixes of what arrived before."""
        for key in self._done.pop(rank, []):
            self._release(self._above(key))
            del self._asked[key]

    def hold(self, rank: int, spans: Mapping[Path, tuple[int, int]]) -> None:
        """Book the full blocks of these nodes of tree `rank`, in place of what was held or kept of it before.

        `spans`: the tokens before each node and up to its end. To be called after `settle`, while nothing of it runs.
        """
        # Forks start anywhere in a tree, once all its paths have ended: nothing else would keep their blocks.
        self._release(self._held.pop(rank, []))
        self.used -= self._kept.pop(rank, 0)
        if spans:
            self._held[rank] = [(rank, path) for path in spans]
            self._share(
                self._held[rank], [end // self.block_size - begin // self.block_size for begin, end in spans.values()]
            )

    def _share(self, nodes: Sequence[Key], blocks: Sequence[int]) -> None:
        for node, count in zip(nodes, blocks, strict=True):
            if node not in self._shared:
                self.used += count
            self._shared.setdefault(node, [count, 0])[1] += 1

    def _release(self, nodes: Sequence[Key]) -> None:
        for node in nodes:
            entry = self._shared[node]
            entry[1] -= 1
            if not entry[1]:
                self.used -= entry[0]
                del self._shared[node]

    def _above(self, key: Key) -> list[Key]:
        rank, path = key
        return [(rank, path[:depth]) for depth in range(len(path))]

    def _full(self, key: Key) -> list[int]:
        """Full blocks that end inside each node above `key`."""
        ends = [end // self.block_size for end in self._asked[key].ends]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    def _alone(self, key: Key) -> int:
        """Blocks that only this segment fills (one more when its prefix ends at a border: that block is recomputed)."""
        # The engine keeps no full block of the whole prefix: it must forward at least one token, hence ends - 1.
        asked = self._asked[key]
        return -(-(asked.ends[-1] + asked.tokens) // self.block_size) - (asked.ends[-1] - 1) // self.block_size

    def _need(self, key: Key) -> int:
        new = (
            blocks for node, blocks in zip(self._above(key), self._full(key), strict=True) if node not in self._shared
        )
        return sum(new) + self._alone(key)

    def _book(self, key: Key) -> None:
        self._share(self._above(key), self._full(key))
        self._own[key] = self._alone(key)
        self.used += self._own[key]
        self.running.add(key)
