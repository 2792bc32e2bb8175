"""What an update costs on this rank: seconds an optimizer step, a micro-batch and a token of it.

    costs = UpdateCosts(pipelined=False, expected=expected_seconds("cpu", layers=4, parameter_bytes=1 << 20))
    run_schedule(..., watch=costs.watch)
    costs.passed()                       # the passes are over
    costs.stepped()                      # the optimizer's step too
    costs.metrics()                      # of all rollouts since the second one, and for a start of the first one

A rollout's update has few micro-batches, so that the fit goes on over a run; the first rollout warms up and drops out.
They are nearly of one size, too: where noise hides what a micro-batch costs beside its tokens, `expected_seconds` says.
Without a pipeline a micro-batch's forward and backward pass lie between two packs that Megatron asks for. With one,
micro-batches overlap, and all of an optimizer step count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from treepo_mega.monitor.costs import CLOCKS, Costs, fitted
from treepo_mega.tree.pack import Pack

COLUMNS = ("step", "micro_batch", "token")
SUFFIX = {"wall": "_s", "cpu": "_cpu_s"}


LAYER_S = MappingProxyType({"cpu": 3e-3, "cuda": 1e-3})
"""Of launching a layer's kernels forward and backward, by device; cpu: measured on the demo's model."""
BYTES_S = MappingProxyType({"cpu": 1e10, "cuda": 2e12})
"""Bytes/s of memory, by device: orders of magnitude, as far as an expectation needs them."""
MOVED = 4
"""A micro-batch reads its weights forward and backward, and reads and writes their gradients."""


def expected_seconds(device: str, layers: int, parameter_bytes: int) -> dict[str, float]:
    """What a micro-batch of this rank's stage costs whatever its tokens, in seconds, by its column."""
    return {"micro_batch": layers * LAYER_S[device] + MOVED * parameter_bytes / BYTES_S[device]}


class UpdateCosts:
    """See the module docstring. `pipelined`: whether there are several pipeline stages. `expected`: as of `fitted`."""

    def __init__(
        self,
        *,
        pipelined: bool,
        expected: Mapping[str, float] = MappingProxyType({}),
        clocks: Mapping[str, Callable[[], float]] = CLOCKS,
    ) -> None:
        self._pipelined = pipelined
        self._expected = expected
        self._clocks = clocks
        self._costs = Costs(COLUMNS, clocks)
        self._count = 0
        self._warm = False
        self._open: tuple[int, int] = (0, 0)
        """Micro-batches that run, and their tokens."""

    def watch(self, packs: Sequence[Pack]) -> Iterator[tuple[int, Pack]]:
        """The packs with their numbers; each is asked for when the one before is through."""
        self._costs.restart()
        self._count += len(packs)
        if self._pipelined:
            self._open = (len(packs), sum(map(_own_tokens, packs)))
        for number, pack in enumerate(packs):
            if not self._pipelined:
                self.passed()
                self._open = (1, _own_tokens(pack))
            yield number, pack

    def passed(self) -> None:
        """What runs is through."""
        count, tokens = self._open
        if count:
            self._costs.add(0, count, tokens)
        self._open = (0, 0)

    def dropped(self) -> None:
        """What runs will not get through: it does not count."""
        self._open = (0, 0)

    def stepped(self) -> None:
        """The optimizer's step is over, and whatever follows the passes."""
        self._costs.add(1, 0, 0)

    def metrics(self) -> dict[str, float]:
        """Of a rollout's updates: micro-batches since the last call, and the costs so far."""
        sums = self._costs.sums()
        out = {"perf/micro_batches": float(self._count)}
        for clock in CLOCKS:
            found = fitted(COLUMNS, sums, clock, expected=self._expected)
            out |= {f"perf/update_{name}{SUFFIX[clock]}": seconds for name, seconds in found.items()}
        if not self._warm:
            self._costs = Costs(COLUMNS, self._clocks)
        self._warm = True
        self._count = 0
        return out


def _own_tokens(pack: Pack) -> int:
    """Tokens that this context-parallel rank computes."""
    return len(pack.tokens if pack.local is None else pack.local)
