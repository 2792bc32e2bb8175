"""A run beside its plan: what `treepo-mega plan CONFIG --json` said of the same configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treepo_mega.monitor.report.numbers import Array, percentile
from treepo_mega.monitor.report.read import ReportError, Run
from treepo_mega.monitor.timers import WALL

GIB = 2.0**30
PER_GPU = "tokens_per_s_per_gpu"


@dataclass(frozen=True)
class PlannedRefit:
    """`moved`: bytes between ranks. By link: GB/s of a rank in one direction, and seconds of the busiest rank."""

    ranks: int
    moved: float
    speeds: dict[str, float]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {"ranks": self.ranks, "bytes_moved": self.moved, "gb_per_s": self.speeds, "seconds": self.seconds}


@dataclass(frozen=True)
class Planned:
    """`seconds`: a step by phase. `bubble`: idle / busy time of pipeline stages. `gib`: peak of a rank by phase."""

    seconds: dict[str, float]
    bubble: float
    update_mfu: float | None
    tokens: dict[str, float]
    gib: dict[str, float]
    refit: PlannedRefit | None
    """None where the plan was made without it."""


def read_plan(path: Path) -> Planned:
    """Raises ReportError naming the file where it cannot be read, or the key that is not as a plan has it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"--plan {path}: cannot be read: {error}") from None
    try:
        mfu = found["update_mfu"]
        return Planned(
            {str(name): float(value) for name, value in found["seconds"].items()},
            float(found["bubble"]),
            None if mfu is None else float(mfu),
            {kind: float(found[PER_GPU][kind]) for kind in ("unique", "flat")},
            {
                str(phase["phase"]): sum(float(size) for _, size in phase["items"]) / GIB
                for phase in found["memory"]["phases"]
            },
            None if found["refit"] is None else _refit(found["refit"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ReportError(f"--plan {path}: expected the output of treepo-mega plan CONFIG --json ({what})") from None


def _refit(found: dict[str, Any]) -> PlannedRefit:
    by_link = found["traffic"]["by_link"]
    return PlannedRefit(
        int(found["world_size"]),
        float(by_link["node"]) + float(by_link["network"]),
        {str(link): float(speed) for link, speed in found["speeds"].items()},
        {str(link): float(seconds) for link, seconds in found["seconds"].items()},
    )


def against(run: Run, throughput: dict[str, Any], planned: Planned) -> list[dict[str, Any]]:
    """Rows of what, measured and planned; None where the run did not log it. Seconds are medians over steps."""
    refit = run.column("reshard/seconds")
    measured = {
        "step": run.column("perf/step_s"),
        # The run's phase holds both; the plan tells them apart.
        "reshard": refit,
        "handover": run.column(WALL + "reshard") - refit,
    }
    rows = []
    for phase, seconds in planned.seconds.items():
        found = measured[phase] if phase in measured else run.column(WALL + phase)
        rows.append({"what": f"{phase}, s", "measured": _median(found), "planned": seconds})
    step = throughput.get("step", {})
    for kind, rate in planned.tokens.items():
        rows.append({"what": f"{kind} tokens/s per GPU", "measured": step.get(f"{kind}_{PER_GPU}"), "planned": rate})
    mfu = throughput.get("update", {}).get("mfu")
    rows.append({"what": "MFU of the update", "measured": mfu, "planned": planned.update_mfu})
    largest = run.series("gpu/memory_used_gib_max")[1]
    peak = max(planned.gib.values(), default=None)
    rows.append({"what": "most memory of a GPU, GiB", "measured": _largest(largest), "planned": peak})
    for phase, gib in planned.gib.items():
        peaks = run.series(f"memory/{phase}_peak_gib")[1]
        rows.append({"what": f"memory in {phase}, GiB", "measured": _largest(peaks), "planned": gib})
    return rows


def _median(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return percentile(known, 0.5) if len(known) else None


def _largest(values: Array) -> float | None:
    return float(values.max()) if len(values) else None
