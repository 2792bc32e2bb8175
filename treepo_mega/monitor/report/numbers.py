"""How figures are written: short numbers, percentiles, thinned series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def short(value: float) -> str:
    """A number for an axis or a table.

    >>> short(1234567), short(0.00012), short(12345), short(0.5)
    ('1.23M', '1.2e-04', '12.3k', '0.5')
    """
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def shown(value: float | None, suffix: str = "") -> str:
    """The same, and a dash for what is not known."""
    return "-" if value is None or not math.isfinite(value) else short(value) + suffix


def weighted(rates: Array, seconds: Array) -> float | None:
    """The mean of `rates`, each by its seconds, where both are known; None where they nowhere are."""
    known = np.isfinite(rates) & (np.nan_to_num(seconds) > 0)
    return float((rates[known] * seconds[known]).sum() / seconds[known].sum()) if known.any() else None


def percentile(values: Sequence[float] | Array, share: float) -> float:
    """The smallest value that `share` of the values do not exceed (nearest rank); ValueError without values."""
    if not len(values):
        raise ValueError("percentile of no values")
    return float(sorted(values)[max(0, math.ceil(share * len(values)) - 1)])


def number(value: Any) -> float | None:
    """For JSON, which has neither NaN nor infinity: those are None."""
    return float(value) if value is not None and math.isfinite(value) else None


def bins(length: int, most: int) -> list[NDArray[np.int64]]:
    """The indices of `length` points in at most `most` runs of neighbours, of sizes that differ by one at most.

    >>> [part.tolist() for part in bins(5, 2)]
    [[0, 1, 2], [3, 4]]
    """
    return [part for part in np.array_split(np.arange(length), max(1, min(length, most))) if len(part)]
