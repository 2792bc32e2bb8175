"""What an engine's steps cost: seconds a step, a token that it forwards, and a request that begins in it.

    spent = EngineCosts()
    spent.begin()                        # the engine is about to be given work
    spent.sent(rank, path, prefix)       # for each request
    spent.stepped(running)               # the engine has made a step with so many segments
    spent.done()                         # what it sampled is delivered

A step forwards a token of each segment that runs, and the prompts that it reads. What a request recomputes of its
prefix counts as part of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from treepo_mega.monitor.costs import CLOCKS, SUM, Costs, fitted

COLUMNS = ("step", "token", "request")
SUFFIX = {"wall": "_s", "cpu": "_cpu_s"}


class EngineCosts:
    """See the module docstring. Waits for graders and for other engines are left out."""

    def __init__(self, clocks: Mapping[str, Callable[[], float]] = CLOCKS) -> None:
        self.steps = 0
        self.running = 0
        """Segments in the batch, summed over steps."""
        self.requests = 0
        self._costs = Costs(COLUMNS, clocks)
        self._read: set[int] = set()
        self._new = 0
        self._tokens = 0

    def begin(self) -> None:
        """Seconds count from now on."""
        self._costs.restart()
        self._new = 0
        self._tokens = 0

    def sent(self, rank: int, path: tuple[int, ...], prefix: int) -> None:
        """A request with a prefix of so many tokens, at `path` of tree `rank`."""
        self._new += 1
        # The first request of a tree reads its prompt; its last token is that of the running segment.
        if len(path) == 1 and rank not in self._read:
            self._read.add(rank)
            self._tokens += prefix - 1

    def stepped(self, running: int) -> None:
        """The engine made a step with so many segments."""
        self.steps += 1
        self.running += running
        self._tokens += running

    def done(self) -> None:
        """The step's segments are delivered."""
        self.requests += self._new
        self._costs.add(1, self._tokens, self._new)

    def counts(self) -> dict[str, float]:
        """Additive over engines and rounds."""
        own = {"engine_steps": self.steps, "running": self.running, "requests": self.requests}
        return own | self._costs.sums()


def of_engine(counts: Mapping[str, float]) -> dict[str, float]:
    """Of a generator's counts, those of `EngineCosts`."""
    kept = ("engine_steps", "running", "requests")
    return {name: value for name, value in counts.items() if name in kept or name.startswith(SUM)}


def cost_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """The metrics of summed `EngineCosts.counts`: requests, and seconds of each of COLUMNS by both clocks."""
    out = {"rollout/requests": totals.get("requests", 0.0)}
    for clock in CLOCKS:
        found = fitted(COLUMNS, totals, clock)
        out |= {f"rollout/engine_{name}{SUFFIX[clock]}": seconds for name, seconds in found.items()}
    return out
