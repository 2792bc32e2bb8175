"""Ranks side by side: who was busy for how long in each phase, who waited, who held the others up, how much memory.

    ranks = Ranks(timers, say=progress.say)
    metrics = ranks.metrics(step)         # collective over all ranks, before timers.pop()

A rank is slow in a phase where it is busy for longer than the median of all ranks. Seconds are busy when the rank does
not wait in the trainer's own collectives and barriers (`runtime/dist.py: seconds_waited`). What it waits inside the
model's collectives, such as gradient sums, counts as busy: there nobody can tell who waits for whom from outside.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import numpy as np

from treepo_mega.monitor.timers import BUSY, PEAK, WAITED, Timers
from treepo_mega.runtime import dist

GIB = 2.0**30
STEP = "step"
SAID_SHARE = 0.1
"""Of the step: a rank that is slower by more counts as slow."""
SAID_STEPS = 3
"""Steps in a row in which a rank has to be slow before the log names it: long answers make any rank slow once."""


class Ranks:
    """See the module's page. `say` prints a line on rank 0. Collective over all ranks, as is `metrics`."""

    def __init__(self, timers: Timers, say: Callable[[str], None]) -> None:
        self._timers = timers
        self._say = say
        self._slow: list[int] = []
        self.hosts: list[str] = dist.gather_objects(socket.gethostname())

    def metrics(self, step: int) -> dict[str, float]:
        """`ranks/` and `memory/` metrics of the phases that ended since the last `Timers.pop`."""
        of_ranks = dist.gather_objects(self._timers.of_rank())
        out, slow = compare(of_ranks)
        if slow is None or slow[2] - slow[3] <= SAID_SHARE * out.get(f"ranks/{STEP}_busy_s_max", 0.0):
            self._slow = []
            return out
        phase, rank, seconds, median = slow
        self._slow = [*(before for before in self._slow if before == rank), rank]
        if len(self._slow) == SAID_STEPS:
            self._say(
                f"step {step}: rank {rank} on {self.hosts[rank]} is slow for the {SAID_STEPS}rd step in a row, now "
                f"busy for {seconds:.1f} s in {phase}, the median of all ranks for {median:.1f} s"
            )
        return out


def compare(of_ranks: Sequence[dict[str, float]]) -> tuple[dict[str, float], tuple[str, int, float, float] | None]:
    """(metrics, (phase, rank, its seconds, the median) furthest above the median or None for one rank).

    >>> metrics, slow = compare([{"busy_s/update": 2.0}, {"busy_s/update": 5.0}, {"busy_s/update": 3.0}])
    >>> metrics["ranks/update_busy_s_p50"], metrics["ranks/slowest"], slow
    (3.0, 1.0, ('update', 1, 5.0, 3.0))
    """
    out: dict[str, float] = {}
    slow: tuple[str, int, float, float] | None = None
    for name in sorted({name for of_rank in of_ranks for name in of_rank}):
        values = [of_rank.get(name, 0.0) for of_rank in of_ranks]
        if name.startswith(PEAK):
            out[f"memory/{name.removeprefix(PEAK)}_peak_gib"] = max(values) / GIB
        if not name.startswith(BUSY):
            continue
        phase = name.removeprefix(BUSY)
        median, high = (float(np.percentile(values, share)) for share in (50, 95))
        out |= {f"ranks/{phase}_busy_s_{what}": value for what, value in (("p50", median), ("p95", high))}
        out[f"ranks/{phase}_busy_s_max"] = max(values)
        # The step is the sum of its phases: a rank is slow in one of them.
        if phase != STEP and len(values) > 1 and (slow is None or max(values) - median > slow[2] - slow[3]):
            slow = (phase, int(np.argmax(values)), max(values), median)
    waited = [of_rank.get(WAITED + STEP, 0.0) for of_rank in of_ranks]
    whole = [wait + of_rank.get(BUSY + STEP, 0.0) for wait, of_rank in zip(waited, of_ranks, strict=True)]
    if all(whole):
        shares = [wait / seconds for wait, seconds in zip(waited, whole, strict=True)]
        out |= {"ranks/idle_share": sum(shares) / len(shares), "ranks/idle_share_max": max(shares)}
    if slow is not None:
        out |= {"ranks/slowest": float(slow[1]), "ranks/slowest_s": slow[2] - slow[3]}
    return out, slow
