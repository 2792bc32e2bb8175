"""The demo's reward, a moment late: grading then lasts long enough for a kill to meet it (chaos.py --slow-rewards)."""

from __future__ import annotations

import time
from typing import Any

from treepo_mega.data.rewards.verifiers import boxed

PAUSE_S = 0.1


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """As the verifier `boxed`."""
    time.sleep(PAUSE_S)
    return boxed(data_source, solution_str, ground_truth, extra_info)
