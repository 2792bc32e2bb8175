"""metrics.jsonl, one line a step, and TensorBoard events written from the same numbers.

    logger = MetricsLogger(run_dir, tensorboard=True, resume_step=None)
    logger.log(step, {"train/loss": 0.1, "learning-rate": 1e-6})
    logger.close()

The file is the record; TensorBoard is a view of it (`<run_dir>/tensorboard`). Each line is
`{"step": int, "time": unix seconds, name: value, ...}` and is flushed before `log` returns, so that a
killed run loses at most the line being written. Names, units and healthy ranges: `monitor/registry.py`.

- A step has one line. Logging a step again (training first, evaluation later) extends its line.
- A NaN or infinite value is null; the line carries `train/nonfinite_metrics`, their number.
- Resuming at step k drops the lines after k, here and in TensorBoard.
- A new run in a folder that holds an older one moves the old file to `metrics.<n>.jsonl`.

Only one process may log (rank 0); this module does not check that.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from treepo_mega.monitor.registry import METRICS, Metric, check_known
from treepo_mega.monitor.rows import METRICS_FILE, MetricsError, read_metrics
from treepo_mega.monitor.sinks.tensorboard import TensorBoard
from treepo_mega.runtime.files import atomic_file

__all__ = ["METRICS", "METRICS_FILE", "Metric", "MetricsError", "MetricsLogger", "check_known", "read_metrics"]

_RESERVED = ("step", "time")

Sink = Callable[[int, Mapping[str, float | None]], None]
"""Takes what `MetricsLogger.log` takes, after it is written; None is a number that was not finite."""


def _plain(value: Any) -> int | float | None:
    """A JSON number, or None when it is not finite (also for numpy and torch scalars)."""
    # A bool is an int too, and `_parse_line` refuses a line that holds true or false.
    if isinstance(value, int):
        return int(value)
    # JSON has no NaN, and most readers of JSON lines die of it.
    number = float(value)
    return number if math.isfinite(number) else None


class MetricsLogger:
    """Writes metrics.jsonl and TensorBoard events, and hands the numbers to `sinks`; see the module's page.

    `resume_step`: the last step whose line is kept; None starts a new file. `config`: flat, for TensorBoard. Raises
    MetricsError when resuming from a malformed file, ValueError from `log` for a step before the last one.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        sinks: Sequence[Sink] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._sinks = sinks
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / METRICS_FILE
        kept = self._keep_until(resume_step) if resume_step is not None else self._set_aside()
        self._last: dict[str, Any] | None = kept[-1] if kept else None
        # Not append mode: the kernel would put every write at the end, and `log` could not extend the last line.
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._offset = _last_line_offset(self._file)
        self._file.seek(0, os.SEEK_END)
        purge = 0 if resume_step is None else resume_step + 1
        self.board = TensorBoard(self.run_dir / "tensorboard", purge_step=purge, config=config) if tensorboard else None

    def _keep_until(self, step: int) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        # The file is written anew even if no row goes: a torn last line would run into the next one.
        with atomic_file(self.path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    def _set_aside(self) -> list[dict[str, Any]]:
        if self.path.exists():
            number = 1
            while (target := self.run_dir / f"metrics.{number}.jsonl").exists():
                number += 1
            os.replace(self.path, target)
        return []

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record `metrics` (name -> number) of `step`; flushed when this returns."""
        if reserved := [name for name in _RESERVED if name in metrics]:
            raise ValueError(f"metric name {reserved[0]!r} is reserved for the line's own field")
        if self._last is not None and step < self._last["step"]:
            raise ValueError(f"step {step} logged after step {self._last['step']}: steps must ascend")
        again = self._last is not None and self._last["step"] == step
        old = self._last if again and self._last is not None else {"step": step}
        values = {name: _plain(value) for name, value in metrics.items()}
        row = {**old, "time": round(time.time(), 3), **values}
        # The whole line is counted, not `values` alone: the second part of a step must not hide the first one's losses.
        if lost := sum(value is None for name, value in row.items()):
            row["train/nonfinite_metrics"] = lost
        if again:
            self._file.seek(self._offset)
        else:
            self._offset = self._file.tell()
        self._file.write((json.dumps(row) + "\n").encode())
        # An extended line can be shorter than the one it replaces: its time may lose a digit.
        self._file.truncate()
        self._file.flush()
        self._last = row
        names = [*values, *(["train/nonfinite_metrics"] if lost else [])]
        if self.board is not None:
            self.board.scalars(step, row["time"], {name: row[name] for name in names})
        # Last: a sink that raises ends the run, whose own record then has the step.
        for sink in self._sinks:
            sink(step, {name: row[name] for name in names})

    @property
    def last(self) -> Mapping[str, Any]:
        """The last line of the file; empty before the first."""
        return self._last or {}

    def close(self) -> None:
        """Flush and close both files; calling it again does nothing."""
        self._file.close()
        if self.board is not None:
            self.board.close()
            self.board = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _last_line_offset(file: Any) -> int:
    """Byte offset at which the last line of a file of whole lines starts; 0 for an empty file."""
    file.seek(0)
    data = file.read()
    return data.rfind(b"\n", 0, len(data) - 1) + 1 if data else 0
