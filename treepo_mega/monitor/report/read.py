"""Reads what a run left behind, and says what is missing or broken instead of stopping there.

A run is a directory with metrics.jsonl; a directory of such directories, as a job array leaves it, stands for all of
them. Metrics are kept as columns: 10,000 steps of 150 metrics take 12 MB.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.monitor.metrics import METRICS_FILE
from treepo_mega.monitor.report.numbers import Array, percentile
from treepo_mega.monitor.report.samples import Samples, load_samples
from treepo_mega.monitor.timers import WALL

LARGEST = 1e300
LINES_NAMED = 3
"""Broken lines that are named one by one at most."""
SILENT_S = 300.0
"""A run that has logged nothing for longer, and for longer than twenty of its steps, is taken for stopped."""


class ReportError(TreepoError):
    """Nothing can be reported on; the message names the directory and what was expected."""


@dataclass(frozen=True)
class Run:
    """What a run left behind. Arrays have an entry a line of metrics.jsonl, in the file's order.

    `kept` is false for lines of a step that was done again later. `columns` holds NaN where a line has no number.
    """

    path: Path
    name: str
    steps: NDArray[np.int64]
    times: Array
    columns: dict[str, Array]
    kept: NDArray[np.bool_]
    config: dict[str, Any]
    summary: dict[str, Any]
    samples: Samples
    notes: list[str] = field(default_factory=list)

    def column(self, metric: str) -> Array:
        """Values by kept line, NaN where there is none."""
        found = self.columns.get(metric)
        return np.full(int(self.kept.sum()), np.nan) if found is None else found[self.kept]

    def series(self, metric: str) -> tuple[NDArray[np.int64], Array]:
        """Steps and values where the metric was logged and finite."""
        values = self.column(metric)
        known = np.isfinite(values)
        return self.steps[self.kept][known], values[known]

    def total(self, metric: str) -> float | None:
        """The sum over kept lines; None where it was never logged."""
        values = self.series(metric)[1]
        return float(values.sum()) if len(values) else None

    @property
    def planned(self) -> int | None:
        """Steps that the configuration asks for."""
        train = self.config.get("train")
        found = train.get("num_rollouts") if isinstance(train, dict) else None
        return found if isinstance(found, int) else None

    def status(self, now: float) -> str:
        """`finished`, `running`, `stopped at step 7 of 40`, or `empty`."""
        if not len(self.steps):
            return "empty"
        last = int(self.steps[-1])
        if self.planned is not None and last >= self.planned:
            return "finished"
        of = "" if self.planned is None else f" of {self.planned}"
        seconds = self.series(WALL + "step")[1]
        patience = max(SILENT_S, 20 * percentile(seconds, 0.95) if len(seconds) else 0.0)
        silent = now - float(self.times[-1])
        return f"running, step {last}{of}" if silent < patience else f"stopped at step {last}{of}"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories, in order, each once. Raises ReportError for a path that neither is one nor holds any."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            siblings = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ReportError(f"{path}: no such run directory{nearest(str(path), siblings, cutoff=0.7)}")
        if any((path / name).exists() for name in (METRICS_FILE, "config.yaml")):
            found.append(path)
            continue
        inner = sorted(one.parent for one in path.glob(f"*/{METRICS_FILE}"))
        if not inner:
            raise ReportError(f"{path}: holds no {METRICS_FILE}; expected a run_dir, or a directory of them")
        found += inner
    return list(dict.fromkeys(found))


def load_run(path: Path) -> Run:
    """Read a run directory. What is missing or broken is in the run's `notes`, which name the file and the line."""
    notes: list[str] = []
    config = _mapping(path / "config.yaml", notes)
    summary = _mapping(path / "summary.json", notes)
    steps, times, columns = read_columns(path / METRICS_FILE, notes)
    kept = _kept(steps)
    if not len(steps):
        notes.append(f"{path}: no step was logged yet, so there are no figures of this run")
    if len(steps) > kept.sum():
        again = int(len(steps) - kept.sum())
        notes.append(f"{path}: {again} lines are of steps that were done again after a resume; their time is counted")
    if older := sorted(one.name for one in path.glob("metrics.*.jsonl")):
        notes.append(f"{path}: holds older runs, which are not counted: {', '.join(older)}")
    return Run(path, str(path), steps, times, columns, kept, config, summary, load_samples(path), notes)


def read_columns(path: Path, notes: list[str]) -> tuple[NDArray[np.int64], Array, dict[str, Array]]:
    """(steps, unix times, values by metric), an entry a line; lines that cannot be used are noted and left out."""
    steps = array("q")
    times = array("d")
    columns: dict[str, array[float]] = {}
    broken = 0
    lost = 0
    try:
        with path.open("rb") as file:
            for place, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row, problem = _row(line)
                if row is None:
                    broken += 1
                    torn = not line.endswith(b"\n")
                    if torn or broken <= LINES_NAMED:
                        why = "the last line is torn: a kill, or being written" if torn else problem
                        notes.append(f"{path}:{place}: left out, {why}")
                    continue
                for name, value in row.items():
                    if name in ("step", "time"):
                        continue
                    # A number that no float holds is as good as none; NaN fails every comparison.
                    if value is None or not -LARGEST < value < LARGEST:
                        lost += 1
                        continue
                    column = columns.setdefault(name, array("d"))
                    column.extend([np.nan] * (len(steps) - len(column)))
                    column.append(value)
                steps.append(row["step"])
                when = row.get("time")
                times.append(when if when is not None and 0 < when < LARGEST else np.nan)
    except OSError as error:
        notes.append(f"{path}: cannot be read: {error.strerror or error}")
    if broken > LINES_NAMED:
        notes.append(f"{path}: {broken} lines were left out in all")
    if lost:
        notes.append(f"{path}: {lost} values were not finite when they were logged, and are left out")
    for column in columns.values():
        column.extend([np.nan] * (len(steps) - len(column)))
    # Copies: a view would keep the growing buffer of `array` alive.
    return np.array(steps, np.int64), np.array(times, np.float64), {k: np.array(v) for k, v in columns.items()}


def _row(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """A line's object, or why it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return None, f"not valid JSON: {error}"
    if not isinstance(row, dict) or isinstance(row.get("step"), bool) or not isinstance(row.get("step"), int):
        return None, 'expected an object with an integer "step"'
    if abs(row["step"]) > sys.maxsize:
        return None, "a step beyond 64 bits"
    for name, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return None, f"{name[:80]!r} is {str(value)[:80]!r}; expected a number or null"
    return row, ""


def _kept(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """False for lines that a later line with the same step, or an earlier one, replaces.

    >>> _kept(np.array([1, 2, 3, 2, 3, 4])).tolist()
    [True, False, False, True, True, True]
    """
    kept = np.ones(len(steps), np.bool_)
    if len(steps) > 1:
        later = np.minimum.accumulate(steps[::-1])[::-1]
        kept[:-1] = steps[:-1] < later[1:]
    return kept


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty, and noted, where it cannot be read."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        # NaN and Infinity are not JSON, and the report's own JSON could not repeat them.
        reads = {
            ".json": lambda: json.loads(text, parse_constant=lambda _: None),
            ".yaml": lambda: yaml.safe_load(text),
        }
        value = reads[path.suffix]()
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path}: cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path}: expected a mapping, got {type(value).__name__}")
        return {}
    return value
