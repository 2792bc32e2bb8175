"""Where the time of a step went, as a table for the console: phases, and empty room of the engines by cause."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from treepo_mega.monitor.timers import CPU, WALL

WHOLE = "step"
OUTSIDE = ("eval", "checkpoint")
"""Phases that come after the step: they have no share of it."""
IDLE = "rollout/idle_share/"
CAUSES = {
    "tail": "nothing left to begin",
    "memory": "no free KV blocks",
    "refill": "graders had yet to say what is replaced, others ran",
    "graders": "the same, nothing ran",
    "tools": "tools of an environment ran, nothing else",
    "engines": "waiting for other engines",
}
"""Cause of `rollout/idle_share/` to its words."""


def phase_table(metrics: Mapping[str, float], title: str) -> Table | None:
    """A row a phase, longest first, and a row a cause of idle room; None where no phases were timed.

    Shares are of the step; those of causes are of the engines' room while they sampled. Rank 0's times.
    """
    whole = metrics.get(WALL + WHOLE)
    if not whole:
        return None
    seconds = {name.removeprefix(WALL): value for name, value in metrics.items() if name.startswith(WALL)}
    del seconds[WHOLE]
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for column in ("s", "share", "CPU s"):
        table.add_column(column, justify="right")
    # Those outside the step last.
    for name, value in sorted(seconds.items(), key=lambda pair: (pair[0] in OUTSIDE, -pair[1])):
        share = "" if name in OUTSIDE else f"{value / whole:.1%}"
        table.add_row(name, f"{value:.2f}", share, f"{metrics.get(CPU + name, 0.0):.2f}")
    between = max(0.0, whole - sum(value for name, value in seconds.items() if name not in OUTSIDE))
    table.add_row("between phases", f"{between:.2f}", f"{between / whole:.1%}", "", end_section=True)
    shares = {name: metrics[IDLE + name] for name in CAUSES if IDLE + name in metrics}
    if shares:
        rollout = seconds.get("rollout", 0.0)
        table.add_row("engines: busy", "", f"{1 - sum(shares.values()):.1%}", "")
        for name, empty in shares.items():
            table.add_row(f"engines idle: {CAUSES[name]}", f"{empty * rollout:.2f}", f"{empty:.1%}", "")
    return table
