"""`treepo-mega report RUN...`: what a run did with its time and tokens, as one HTML file and one JSON.

    write_report([Path("runs/demo")], Path("runs/demo"))   ->  report.html, report.json

Reads what a run leaves behind (`metrics.jsonl`, `config.yaml`, `summary.json`), also while it is still
running. `summary.py` turns rows into figures, `svg.py` draws, `page.py` lays out. The page holds no script
and loads nothing: it can be mailed, and opened on a machine without a network. Everything that came from a
run is escaped. Several runs are drawn over one another, for comparison.

report.json: `{"runs": [figures of a run, ...]}`; the keys are those of `summary.summarise`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from treepo_mega.monitor.report.page import render_page
from treepo_mega.monitor.report.summary import ReportError, load_run, summarise
from treepo_mega.monitor.report.table import print_table

__all__ = ["ReportError", "write_report"]


def write_report(run_dirs: Sequence[Path], output: Path) -> list[Path]:
    """Write report.html and report.json for `run_dirs` into `output`, print a short table; returns both paths.

    Raises ReportError naming the file (and line) when a run cannot be read; nothing is written then.
    """
    runs = [load_run(path) for path in run_dirs]
    figures = [summarise(run) for run in runs]
    # Both texts exist before the first write: a run that cannot be drawn leaves the old report whole.
    texts = {
        "report.html": render_page(runs, figures),
        "report.json": json.dumps({"runs": figures}, indent=2, allow_nan=False) + "\n",
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (output / name).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ReportError(f"{output}: cannot write the report: {e}") from None
    print_table(figures)
    return [output / name for name in texts]
