"""A sink for metrics: rows of a CSV file, one number a row.

METRICS_CSV=runs/all.csv treepo-mega train my.yaml 'logging.sinks=[examples/plugins/logger.py:append_csv]'
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path


def append_csv(step: int, metrics: Mapping[str, float | None]) -> None:
    """Append `step, name, value` rows; numbers that were not finite are left out."""
    path = Path(os.environ.get("METRICS_CSV", "runs/metrics.csv"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([step, name, value] for name, value in metrics.items() if value is not None)
