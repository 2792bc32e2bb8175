"""A verdict that differs between the responses of a model that has learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def length_is_even(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None
) -> float:
    """Whether the response has an even number of characters."""
    return float(len(solution_str) % 2 == 0)
