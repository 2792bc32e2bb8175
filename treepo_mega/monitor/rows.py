"""Reading a metrics.jsonl back, without what writes it. Pure."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from treepo_mega.errors import TreepoError

METRICS_FILE = "metrics.jsonl"


class MetricsError(TreepoError):
    """A metrics file cannot be used; the message names the file, the line and what was expected."""


def _parse_line(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as e:
        raise MetricsError(f"{where}: not valid JSON: {e.msg} (column {e.colno})") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise MetricsError(f'{where}: expected an object with an integer "step"')
    for name, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise MetricsError(f"{where}: {name!r} is {value!r}; expected a number or null")
    return row


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in file order.

    A last line without its newline that does not parse was torn by a kill (or is being written):
    it is left out with a warning. Raises MetricsError (file:line) for anything else that is malformed,
    for steps that do not ascend, and when the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise MetricsError(f"{path}: cannot read the metrics: {e}") from None
    rows: list[dict[str, Any]] = []
    # Not splitlines: `split` gives one more piece after a last newline, so that the last number means a torn line.
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse_line(line, f"{path}:{number}")
        except MetricsError:
            # Torn by a kill, or being written right now.
            if number == len(lines):
                warnings.warn(f"{path}:{number}: the last line is torn and was left out", stacklevel=2)
                break
            raise
        if rows and row["step"] <= rows[-1]["step"]:
            raise MetricsError(f"{path}:{number}: step {row['step']} comes after step {rows[-1]['step']}")
        rows.append(row)
    return rows
