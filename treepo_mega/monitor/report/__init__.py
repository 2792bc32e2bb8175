"""`treepo-mega report RUN...`: where a run's GPU-hours went and what it learned, as HTML, JSON and Markdown.

    write_report([Path("runs/demo")], Path("runs/demo"))   ->  report.html, report.json, report.md

Reads what a run leaves behind (`metrics.jsonl`, `config.yaml`, `summary.json`, `trees/`, `trace/`), also while it is
still running, and needs no torch. `read.py` reads, `hours.py` accounts for the time, `summary.py` makes the figures,
`comparison.py` sets them beside a baseline, `sections.py` and `page.py` lay them out. The page can be mailed, and opens
on a machine without a network. What is missing or broken is said on the page, and the rest is made.

report.json: `{"runs": [...], "baselines": [...], "comparison": {...}, "slurm": {...}}`; the keys of a run are those of
`summary.summarise`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_mega.monitor.report import markdown
from treepo_mega.monitor.report.comparison import compare, to_dict
from treepo_mega.monitor.report.planned import Planned, read_plan
from treepo_mega.monitor.report.read import ReportError, find_runs, load_run
from treepo_mega.monitor.report.sections import render
from treepo_mega.monitor.report.slurm import charged
from treepo_mega.monitor.report.summary import Seen, summarise
from treepo_mega.monitor.report.table import print_table
from treepo_mega.runtime.files import atomic_file

__all__ = ["Asked", "ReportError", "write_live", "write_report"]


@dataclass(frozen=True)
class Asked:
    """The command's options. `price` is of a GPU-hour; `gpus` overrides what the metrics say."""

    baselines: tuple[Path, ...] = ()
    jobs: tuple[str, ...] = ()
    gpus: float | None = None
    price: float | None = None
    plan: Path | None = None
    """What `treepo-mega plan CONFIG --json` wrote; of the runs, not of the baselines."""


def write_report(
    run_dirs: Sequence[Path], output: Path, asked: Asked | None = None, *, refresh_s: float | None = None
) -> list[Path]:
    """Write report.html, .json and .md for `run_dirs` into `output`, print a short table; returns the paths.

    Raises ReportError naming a directory that is no run; what is broken inside a run is noted in the report.
    """
    paths, _ = _write(run_dirs, output, asked or Asked(), refresh_s)
    return paths


def write_live(
    run_dirs: Sequence[Path],
    output: Path,
    asked: Asked,
    *,
    period_s: float,
    wait: Callable[[float], None] = time.sleep,
) -> list[Path]:
    """Write the report again every `period_s` until all runs have finished; the page reloads itself meanwhile."""
    while True:
        _, finished = _write(run_dirs, output, asked, period_s)
        if finished:
            # Once more, without the reload: the page stays as it is from here on.
            return _write(run_dirs, output, asked, None)[0]
        wait(period_s)


def _write(run_dirs: Sequence[Path], output: Path, asked: Asked, refresh_s: float | None) -> tuple[list[Path], bool]:
    """The paths, and whether every run has finished. A page that is written again and again prints nothing."""
    now = time.time()
    found = find_runs(run_dirs)
    bases = [path for path in find_runs(asked.baselines) if path not in found]
    if asked.baselines and not bases:
        raise ReportError(f"--baseline {asked.baselines[0]}: is among the runs; expected another run")
    plan = None if asked.plan is None else read_plan(asked.plan)

    def figures(path: Path, plan: Planned | None = None) -> Seen:
        return summarise(load_run(path), now=now, gpus=asked.gpus, price=asked.price, plan=plan)

    runs = [figures(path, plan) for path in found]
    baselines = [figures(path) for path in bases]
    comparison = compare(runs, baselines)
    slurm = charged(asked.jobs)
    data = {
        "runs": [seen.figures for seen in runs],
        "baselines": [seen.figures for seen in baselines],
        "comparison": to_dict(comparison),
        "slurm": slurm.to_dict(),
    }
    # All texts exist before the first write: a run that cannot be drawn leaves the old report whole.
    texts = {
        "report.html": render(runs, baselines, comparison, slurm, now=now, refresh_s=refresh_s),
        "report.json": json.dumps(data, indent=2, allow_nan=False, default=str) + "\n",
        "report.md": markdown.render(runs, baselines, comparison, slurm),
    }
    try:
        for name, text in texts.items():
            with atomic_file(output / name) as file:
                file.write(text)
    except OSError as error:
        raise ReportError(f"{output}: cannot write the report: {error}") from None
    if refresh_s is None:
        print_table([seen.figures for seen in (*runs, *baselines)])
    return [output / name for name in texts], all(seen.figures["status"] == "finished" for seen in runs)
