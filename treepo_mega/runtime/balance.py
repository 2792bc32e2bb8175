"""Deal work to ranks and micro-batches: near equal cost, under a cap, in n log n time. Pure Python.

Two classical greedy rules. *Longest first* (`balance`): largest item to the emptiest bin; the gap between bins is at
most one item. *Best fit* (`fill`): largest item to the fullest bin that still takes it; needs at most 11/9 of the
fewest bins. `deal` takes the number of bins from the second and the even loads from the first when they respect the
cap. All are deterministic: every rank computes the same answer.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], bins: int, loads: Sequence[float] = ()) -> list[list[int]]:
    """Indices dealt to `bins` so that sums are near equal: largest first, each to the emptiest bin.

    `loads`: what the bins hold already; none: they are empty.
    """
    out: list[list[int]] = [[] for _ in range(bins)]
    # Ties go by index, in the heap and in the order: every rank must compute the same deal.
    heap: list[tuple[float, int]] = [(load, bin_) for bin_, load in enumerate(loads or [0.0] * bins)]
    heapq.heapify(heap)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, bin_ = heap[0]
        out[bin_].append(i)
        heapq.heapreplace(heap, (load + costs[i], bin_))
    return [sorted(bin_) for bin_ in out]


def fill(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """Indices in as few bins of `cap` as best fit finds. Raises ValueError for an item above the cap."""
    out: list[list[int]] = []
    # (free, bin), ascending: the fullest bin that still takes an item is the first with enough room.
    room: list[tuple[int, int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[i] > cap:
            raise ValueError(f"an item of {sizes[i]} does not fit a bin of {cap}")
        # -1 comes before every bin's number, so that a bin with exactly this room is found.
        at = bisect.bisect_left(room, (sizes[i], -1))
        if at == len(room):
            out.append([i])
            bisect.insort(room, (cap - sizes[i], len(out) - 1))
        else:
            free, bin_ = room.pop(at)
            out[bin_].append(i)
            bisect.insort(room, (free - sizes[i], bin_))
    return [sorted(bin_) for bin_ in out]


def deal(sizes: Sequence[int], cap: int, bins: int) -> list[list[int]]:
    """`bins` bins of at most `cap`, as even as longest-first gives where that respects the cap; may hold empty ones.

    `bins` must be at least the number that `fill` needs.
    """
    even = balance(sizes, bins)
    if all(sum(sizes[i] for i in bin_) <= cap for bin_ in even):
        return even
    tight = fill(sizes, cap)
    return tight + [[] for _ in range(bins - len(tight))]
