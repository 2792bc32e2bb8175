"""The report's few lines for the console: a column per run, a row per figure."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from treepo_mega.monitor.report.numbers import short

# Runs of versions before 0.2 logged the means over leaves alone.
REWARD = ("rollout/reward_policy", "rollout/reward_mean")
ACCURACY = ("rollout/accuracy_policy", "rollout/accuracy")


def print_table(figures: list[dict[str, Any]], console: Console | None = None) -> None:
    """Steps, rewards and accuracies from first to last step, token ratio, refit rate, then the phases by share."""
    table = Table("", *(escape(f["run"]) for f in figures))
    table.add_row("status", *(escape(f["status"]) for f in figures))
    table.add_row("steps", *("-" if f["steps"] == 0 else f"{f['first_step']} to {f['last_step']}" for f in figures))
    table.add_row("hours", *(f"{short(f['hours'])} {f['unit']}" for f in figures))
    for label, metrics in (("reward", REWARD), ("accuracy", ACCURACY), ("eval", ("eval/accuracy",))):
        table.add_row(label, *(trend(f, *metrics) for f in figures))
    table.add_row("token_ratio", *("-" if f["token_ratio"] is None else f"{f['token_ratio']:.3f}" for f in figures))
    for label, metric, unit in (("step p50", "perf/step_s", "s"), ("refit p50", "reshard/gb_per_s", "GB/s")):
        values = [f["medians"].get(metric) for f in figures]
        table.add_row(label, *("-" if v is None else f"{short(v)} {unit}" for v in values))
    by_name = [{p["name"]: p for p in f["phases"]} for f in figures]
    for name in dict.fromkeys(name for phases in by_name for name in phases):
        cells = [_phase(phases.get(name)) for phases in by_name]
        table.add_row(f"  {escape(name)}", *cells)
    (console or Console()).print(table)


def _phase(phase: dict[str, Any] | None) -> str:
    if phase is None:
        return "-"
    return f"{phase['share']:.1%}" + ("" if phase["p50"] is None else f" (p50 {short(phase['p50'])} s)")


def trend(figures: dict[str, Any], *metrics: str) -> str:
    """`first → last` of the first of `metrics` that the run logged, or a dash when it logged none."""
    found = next((figures["trends"][metric] for metric in metrics if metric in figures["trends"]), None)
    return "-" if found is None else f"{found['first']:.3f} \N{RIGHTWARDS ARROW} {found['last']:.3f}"
