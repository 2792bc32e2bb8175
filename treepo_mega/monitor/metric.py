"""One documented metric."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """`healthy` is prose: what a run that works shows, and what to do where it is otherwise."""

    name: str
    unit: str
    healthy: str
    meaning: str

    def names(self) -> list[str]:
        """The concrete names: one, or one per alternative in braces; of two pairs of braces, every combination."""
        match = re.fullmatch(r"(.*?)\{([^}]*)\}(.*)", self.name)
        if match is None:
            return [self.name]
        head, alternatives, tail = match.groups()
        # The rest may hold braces of its own.
        rests = Metric(tail, self.unit, self.healthy, self.meaning).names()
        return [head + alternative + rest for alternative in alternatives.split(",") for rest in rests]
