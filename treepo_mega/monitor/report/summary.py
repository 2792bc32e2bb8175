"""From a run's files to the figures of its report.

Shares are of `timing_s/step` plus the phases that lie outside it (evaluation, checkpoints), or of the sum of
all phases where a run has no `timing_s/step`; what no phase of the step accounts for is shown as `other`. The
token ratio is that of the whole run (sum of unique tokens / sum of flat tokens), not a mean of ratios, which
would give a step of few tokens the weight of one of many.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from treepo_mega.errors import TreepoError
from treepo_mega.monitor.metrics import METRICS_FILE, MetricsError, read_metrics
from treepo_mega.monitor.report.samples import Samples, load_samples
from treepo_mega.monitor.timers import WALL

Row = dict[str, Any]
TOKENS = {
    "generated": "rollout/generated_tokens",
    "cached": "rollout/cached_tokens",
    "recomputed": "rollout/recomputed_tokens",
    "unique": "tree/unique_tokens",
    "flat": "tree/flat_tokens",
}
TRENDS = (
    "rollout/reward_policy",
    "rollout/accuracy_policy",
    "rollout/reward_mean",
    "rollout/accuracy",
    "reward/mean",
    "eval/accuracy",
    "eval/greedy_accuracy",
)
MEDIANS = ("perf/tokens_per_s", "perf/step_s", "reshard/gb_per_s", "reshard/seconds", "reshard/bytes")
TOTALS = ("reward/lost", "train/skipped_steps", "train/nonfinite_metrics", "tree/shortfall", "tree/fallbacks")
OUTSIDE_STEP = ("eval", "checkpoint")
"""Phases that the loop runs after `timing_s/step` has ended."""


class ReportError(TreepoError):
    """A run cannot be reported on; the message names the file, the line and what was expected."""


@dataclass(frozen=True)
class Run:
    """What a run left behind. `rows` ascend in step; what lies in other files is empty when they are not there."""

    name: str
    rows: list[Row]
    config: Row
    summary: Row
    samples: Samples = field(default_factory=Samples)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of `metric` where it was logged and finite."""
        points = [(row["step"], row[metric]) for row in self.rows if row.get(metric) is not None]
        return [point[0] for point in points], [point[1] for point in points]


def load_run(path: Path) -> Run:
    """Read a run directory. Raises ReportError for a missing or malformed file, or a run without a step."""
    if not path.is_dir():
        raise ReportError(f"{path}: no such run directory")
    if not (path / METRICS_FILE).exists():
        raise ReportError(f"{path}: holds no {METRICS_FILE}; expected the run_dir of a run that made a step")
    try:
        rows = read_metrics(path / METRICS_FILE)
    except MetricsError as e:
        raise ReportError(str(e)) from None
    if not rows:
        raise ReportError(f"{path / METRICS_FILE}: no step was logged yet")
    config = _mapping(path / "config.yaml")
    return Run(str(path), rows, config, _mapping(path / "summary.json"), load_samples(path))


def _mapping(path: Path) -> Row:
    """The mapping in a YAML or JSON file; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ReportError(f"{path}: cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a mapping, got {type(value).__name__}")
    return value


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed (nearest rank); ValueError without values."""
    if not values:
        raise ValueError("percentile of no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def phases(run: Run) -> list[Row]:
    """Seconds by phase, longest first: name, steps (in which it ran), p50, p95, total, share of the step time."""
    names = sorted({name for row in run.rows for name in row if name.startswith(WALL)} - {WALL + "step"})
    found = []
    for name in names:
        values = run.series(name)[1]
        if values:
            found.append(_phase(name.removeprefix(WALL), values))
    phase_total = sum(part["total"] for part in found)
    outside = sum(part["total"] for part in found if part["name"] in OUTSIDE_STEP)
    whole = max(sum(run.series(WALL + "step")[1]) + outside, phase_total)
    if whole - phase_total > 1e-3 * whole:
        found.append({"name": "other", "steps": len(run.rows), "p50": None, "p95": None, "total": whole - phase_total})
    for phase in found:
        phase["share"] = phase["total"] / whole if whole else 0.0
    return sorted(found, key=lambda part: -part["total"])


def _phase(name: str, values: list[float]) -> Row:
    return {
        "name": name,
        "steps": len(values),
        "p50": percentile(values, 0.5),
        "p95": percentile(values, 0.95),
        "total": sum(values),
    }


def summarise(run: Run) -> Row:
    """The figures of a run, JSON-safe. A figure the run did not log is null.

    Keys: run, steps, first_step, last_step, phases (see `phases`), tokens (sums of generated, cached,
    recomputed, unique, flat), token_ratio, trends (metric -> first, last, best, count), medians
    (metric -> p50 over steps), totals (metric -> sum; faults that should be 0), summary (summary.json).
    """
    tokens = {name: _sum(run, metric) for name, metric in TOKENS.items()}
    unique = tokens["unique"]
    flat = tokens["flat"]
    trends = {}
    for metric in TRENDS:
        values = run.series(metric)[1]
        if values:
            trends[metric] = {"first": values[0], "last": values[-1], "best": max(values), "count": len(values)}
    medians = {key: percentile(found, 0.5) for key in MEDIANS if (found := run.series(key)[1])}
    return {
        "run": run.name,
        "steps": len(run.rows),
        "first_step": run.rows[0]["step"],
        "last_step": run.rows[-1]["step"],
        "phases": phases(run),
        "tokens": tokens,
        "token_ratio": unique / flat if unique is not None and flat else None,
        "trends": trends,
        "medians": medians,
        "totals": {key: total for key in TOTALS if (total := _sum(run, key)) is not None},
        "summary": run.summary,
    }


def _sum(run: Run, metric: str) -> float | None:
    values = run.series(metric)[1]
    return sum(values) if values else None
