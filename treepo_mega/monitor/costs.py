"""What many like steps cost: seconds for a step itself, and for each thing that it holds. By least squares.

    costs = Costs(("step", "token"))
    costs.restart()
    ...                                # one step, with 12 tokens
    costs.add(1, 12)
    fitted(("step", "token"), costs.sums(), "cpu")        # {"step": 0.0041, "token": 0.00002}: seconds each

Steps of one run differ in what they hold, so that one run tells the two apart. `treepo-mega plan --calibrate` takes
them for runs of other sizes. Sums are additive over ranks and rounds; a fit has no negative cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

CLOCKS: Mapping[str, Callable[[], float]] = MappingProxyType({"wall": time.perf_counter, "cpu": time.process_time})
"""By name: seconds; cpu: of this process, all threads."""
SUM = "cost/"
"""Prefix of the sums' names."""
COUNT = f"{SUM}steps"
ERR_TOGETHER = 8
"""A machine's speed drifts: the errors of so many steps in a row count as one."""


class Costs:
    """Sums over steps of what they hold, by `columns`, and of the seconds that they took; tests bring `clocks`."""

    def __init__(self, columns: Sequence[str], clocks: Mapping[str, Callable[[], float]] = CLOCKS) -> None:
        self.columns = tuple(columns)
        self._clocks = clocks
        self._count = 0
        self._gram = np.zeros((len(self.columns), len(self.columns)))
        self._seconds = {name: np.zeros(len(self.columns)) for name in clocks}
        self._squares = dict.fromkeys(clocks, 0.0)
        self._last: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Seconds count from now on."""
        self._last = {name: clock() for name, clock in self._clocks.items()}

    def add(self, *counts: float) -> None:
        """A step ended that held `counts`, one a column; the next one begins."""
        row = np.array(counts, float)
        self._count += 1
        self._gram += np.outer(row, row)
        for name, clock in self._clocks.items():
            now = clock()
            self._seconds[name] += (now - self._last[name]) * row
            self._squares[name] += (now - self._last[name]) ** 2
            self._last[name] = now

    def sums(self) -> dict[str, float]:
        """Additive: how many steps, products of columns, of columns with seconds, and of seconds with themselves."""
        out = {COUNT: float(self._count)}
        out |= {
            f"{SUM}{self.columns[left]}*{self.columns[right]}": float(self._gram[left, right])
            for left, right in itertools.combinations_with_replacement(range(len(self.columns)), 2)
        }
        for clock, seconds in self._seconds.items():
            out |= {f"{SUM}{name}*{clock}": float(value) for name, value in zip(self.columns, seconds, strict=True)}
            out[f"{SUM}{clock}*{clock}"] = self._squares[clock]
        return out


def fitted(
    columns: Sequence[str], sums: Mapping[str, float], clock: str, expected: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """Seconds of one of each of `columns`, none negative, by least squares over all steps; all 0 without a step.

    `expected`: seconds of some columns before anything was measured, known to a factor of about two. Steps of nearly
    one size cannot tell such a column from others when they are noisy; then it stays near what is expected. This is
    the mean of a normal posterior, with the noise that plain least squares leaves. Without noise both are the same.

    >>> costs = Costs(("step", "token"))
    >>> fitted(("step", "token"), costs.sums(), "cpu")
    {'step': 0.0, 'token': 0.0}
    """
    size = len(columns)
    gram = np.array([[_product(sums, columns[row], columns[column]) for column in range(size)] for row in range(size)])
    seconds = np.array([sums.get(f"{SUM}{name}*{clock}", 0.0) for name in columns])
    scale = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), 1.0))
    gram = gram / np.outer(scale, scale)
    seconds = seconds / scale
    best = _least_squares(gram, seconds)
    if expected and sums[COUNT]:
        left = sums[f"{SUM}{clock}*{clock}"] + float(best @ gram @ best - 2 * best @ seconds)
        noise = max(0.0, left) / sums[COUNT] * ERR_TOGETHER
        prior = scale * np.array([expected.get(name, 0.0) for name in columns])
        weight = np.array([noise / one**2 if one else 0.0 for one in prior])
        best = _least_squares(gram + np.diag(weight), seconds + weight * prior)
    return {name: float(value) for name, value in zip(columns, best / scale, strict=True)}


def _least_squares(gram: np.ndarray, products: np.ndarray) -> np.ndarray:
    """The x of no negative entry with the least x gram x - 2 x products."""
    size = len(products)
    best = np.zeros(size)
    least = 0.0
    # Few columns: every choice of those that cost something is tried.
    for count in range(size, 0, -1):
        for chosen in map(list, itertools.combinations(range(size), count)):
            # Where steps hold the same in two columns, their cost is shared between the two.
            found = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], products[chosen], rcond=1e-9)[0]
            left = found @ gram[np.ix_(chosen, chosen)] @ found - 2 * found @ products[chosen]
            if (found >= 0).all() and left < least - 1e-12 * abs(least):
                least = float(left)
                best = np.zeros(size)
                best[chosen] = found
    return best


def _product(sums: Mapping[str, float], left: str, right: str) -> float:
    return sums.get(f"{SUM}{left}*{right}", sums.get(f"{SUM}{right}*{left}", 0.0))
