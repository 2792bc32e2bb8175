"""A reward beside the right answer: one answer box, and an end that the model chose itself.

data.verifier=examples/plugins/reward.py:form
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def form(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    trajectory: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Half for exactly one box, half for a response that was not cut."""
    one_box = float(solution_str.count("\\boxed{") == 1)
    ended = float(trajectory is None or trajectory["stop"] in ("eos", "answer"))
    return {"score": 0.5 * one_box + 0.5 * ended, "one_box": one_box, "ended": ended}
