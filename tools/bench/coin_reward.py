"""A reward for models with random weights: a coin that the text throws, so that answers of a prompt differ."""

from __future__ import annotations

import zlib
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """0 or 1, the same for the same text."""
    return float(zlib.crc32(solution_str.encode()) % 2)
