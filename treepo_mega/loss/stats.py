"""What a loss reports beside its value: sums, which are divided by the step's pairs, and maxima."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Stats:
    """Scalars [] by name. No name is both a sum and a maximum.

    >>> first = Stats({"loss": torch.tensor(1.0)}, {"max_ratio_diff": torch.tensor(0.5)})
    >>> second = Stats({"loss": torch.tensor(2.0)}, {"max_ratio_diff": torch.tensor(0.25)})
    >>> {name: float(value) for name, value in (first + second).by_name().items()}
    {'loss': 3.0, 'max_ratio_diff': 0.5}
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Added over rows, micro-batches and ranks."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """The largest over rows, micro-batches and ranks."""

    def __add__(self, other: Stats) -> Stats:
        """The statistics of both sets of rows. A name that one side lacks keeps the other's value."""
        sums = dict(self.sums)
        for name, value in other.sums.items():
            sums[name] = sums[name] + value if name in sums else value
        maxima = dict(self.maxima)
        for name, value in other.maxima.items():
            maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        return Stats(sums, maxima)

    def detach(self) -> Stats:
        """The same numbers without gradients."""
        return Stats(
            {name: value.detach() for name, value in self.sums.items()},
            {name: value.detach() for name, value in self.maxima.items()},
        )

    def by_name(self) -> dict[str, Tensor]:
        """Sums and maxima in one dict."""
        return self.sums | self.maxima
