"""Where a run met its machines: memory by phase, ranks side by side, the refit against what links allow, empty room.

Figures are JSON-safe; `blocks` lays them out once, as plain text, for the page and for its Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treepo_mega.monitor.phases import CAUSES
from treepo_mega.monitor.registry_machine import PHASES
from treepo_mega.monitor.report.hours import Spent
from treepo_mega.monitor.report.numbers import percentile, short, shown, weighted
from treepo_mega.monitor.report.planned import Planned
from treepo_mega.monitor.report.read import Run
from treepo_mega.monitor.report.stragglers import RANKS_SHOWN
from treepo_mega.monitor.timers import WALL

Row = dict[str, Any]
NAMES = tuple(PHASES.split(","))
ENDS = ("p50", "p95", "max")
GB = 1e9


@dataclass(frozen=True)
class Block:
    """A table under its title. Cells are plain text; the first column is its rows' names."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def memory_by_phase(run: Run, plan: Planned | None) -> list[Row]:
    """GiB of the fullest rank, by phase: median and maximum over steps, and what was planned; None where not known."""
    planned = {} if plan is None else plan.gib
    rows = []
    for phase in (*NAMES, *(name for name in planned if name not in NAMES)):
        values = run.series(f"memory/{phase}_peak_gib")[1]
        if len(values) or phase in planned:
            middle = percentile(values, 0.5) if len(values) else None
            most = float(values.max()) if len(values) else None
            rows.append({"phase": phase, "p50": middle, "max": most, "planned": planned.get(phase)})
    return rows


def slow_ranks(run: Run) -> Row | None:
    """Of the `ranks/` metrics; None for a run without them, and for one rank, which nobody waits for.

    `slowest`: rank, steps in which it was the slowest, seconds that it was above the median then, the most in a step;
    those with most seconds first. `steps`: that name a slowest rank. `phases`: busy seconds of a step over ranks, mean
    over steps. `idle_share`, `idle_share_max`: of the steps' time, mean over ranks and the rank that waited most.
    """
    named = run.column("ranks/slowest")
    above = run.column("ranks/slowest_s")
    known = np.isfinite(named) & np.isfinite(above)
    if not known.any():
        return None
    slowest = []
    for rank in np.unique(named[known]):
        seconds = above[known & (named == rank)]
        slowest.append(
            {
                "rank": int(rank),
                "steps": len(seconds),
                "seconds": float(seconds.sum()),
                "largest": float(seconds.max()),
            }
        )
    slowest.sort(key=lambda row: (-row["seconds"], row["rank"]))
    phases = {}
    for phase in NAMES:
        ends = {end: run.series(f"ranks/{phase}_busy_s_{end}")[1] for end in ENDS}
        if all(len(values) for values in ends.values()):
            phases[phase] = {end: float(values.mean()) for end, values in ends.items()}
    step_s = run.column(WALL + "step")
    return {
        "slowest": slowest,
        "steps": int(known.sum()),
        "phases": phases,
        "idle_share": weighted(run.column("ranks/idle_share"), step_s),
        "idle_share_max": weighted(run.column("ranks/idle_share_max"), step_s),
    }


def refit(run: Run, spent: Spent, plan: Planned | None) -> list[Row]:
    """Rows of what, measured, bound and their ratio; empty for a run without refits, None for what is not known.

    Bytes are those that came from another rank. Their bound is what receivers did not hold already, as the metrics
    have it. The bound of seconds and of GB/s is the plan's busiest link, all links busy at once.
    """
    moved = run.column("reshard/bytes_moved") / GB
    seconds = run.column("reshard/seconds")
    known = np.isfinite(moved) & np.isfinite(seconds) & (seconds > 0)
    if not known.any():
        return []
    links = None if plan is None else plan.refit
    over = run.series("reshard/bytes_over_bound")[1]
    size = percentile(moved[known], 0.5)
    factor = percentile(over, 0.5) if len(over) else None
    took = percentile(seconds[known], 0.5)
    of_ranks = seconds * spent.devices[run.kept]
    shared = float(moved[known].sum() / of_ranks[known].sum()) if spent.known else None
    least = None if links is None else max(links.seconds.values())
    rate = None if links is None or not least else links.moved / GB / least
    return [
        {
            "what": "moved between ranks, GB",
            "measured": size,
            # Nothing to move counts as at its bound, by the metric's own rule.
            "bound": size / factor if factor else None,
            "ratio": factor,
        },
        _row("seconds of a refit", took, least),
        _row("GB/s, all ranks", float(moved[known].sum() / seconds[known].sum()), rate),
        _row("GB/s of a rank", shared, None if links is None or rate is None else rate / links.ranks),
    ]


def _row(what: str, measured: float | None, bound: float | None) -> Row:
    ratio = measured / bound if measured is not None and bound else None
    return {"what": what, "measured": measured, "bound": bound, "ratio": ratio}


def blocks(figures: Row) -> list[Block]:
    """The tables of a run's figures, those that have rows."""
    found = [_refit(figures), _idle(figures), _memory(figures), _others(figures), *_ranks(figures)]
    return [block for block in found if block.rows]


def _refit(figures: Row) -> Block:
    rows = [(row["what"], *(shown(row[key]) for key in ("measured", "bound", "ratio"))) for row in figures["refit"]]
    note = "GB/s are bytes moved / seconds, of the whole run; the others are medians over steps."
    links = figures["links"]
    if links is None:
        note += " The bound of seconds needs --plan."
    else:
        speeds = ", ".join(f"{link} {short(speed)}" for link, speed in links["gb_per_s"].items())
        note += f" The plan's links, GB/s of each of {links['ranks']} ranks in one direction: {speeds}."
        note += " The busiest sets the bound."
    return Block("Refit against its bound", note, ("", "measured", "bound", "measured / bound"), rows)


def _idle(figures: Row) -> Block:
    rows = [(CAUSES[cause], f"{share:.1%}") for cause, share in figures["idle"].items()]
    return Block("Empty room of the engines", "", ("cause", "share of their room"), rows)


def _memory(figures: Row) -> Block:
    rows = [
        (row["phase"], *(shown(row[key]) for key in ("p50", "max", "planned"))) for row in figures["memory_by_phase"]
    ]
    note = (
        "Of the fullest rank, over steps. On CUDA it is what torch has allocated, without an engine's own pool, which "
        "the plan counts; on a CPU it is the process's resident memory."
    )
    return Block("Memory by phase, GiB", note, ("phase", "median peak", "largest peak", "planned"), rows)


def _others(figures: Row) -> Block:
    rows = [(row["name"], shown(row["p50"]), shown(row["max"])) for row in figures["memory"]]
    return Block("Memory, GiB", "", ("what", "median", "largest"), rows)


def _ranks(figures: Row) -> list[Block]:
    ranks = figures["ranks"]
    if ranks is None:
        return []
    slow = [
        (
            *(f"rank {row['rank']}", str(row["steps"]), f"{row['steps'] / ranks['steps']:.0%}"),
            *(shown(row["seconds"], " s"), shown(row["largest"], " s")),
        )
        for row in ranks["slowest"][:RANKS_SHOWN]
    ]
    note = "The rank that is furthest above the median of all ranks in a phase."
    if ranks["idle_share"] is not None and ranks["idle_share_max"] is not None:
        note += (
            f" Ranks waited for {ranks['idle_share']:.1%} of the steps' time, "
            f"the one that waited most for {ranks['idle_share_max']:.1%}."
        )
    busy = [(phase, *(shown(ends[end], " s") for end in ENDS)) for phase, ends in ranks["phases"].items()]
    about = "Seconds of a step without waits in the trainer's own collectives, mean over steps."
    head = ("rank", "slowest in, steps", "of steps", "above the median, in all", "most in a step")
    return [Block("Stragglers", note, head, slow), Block("Busy by phase, over ranks", about, ("phase", *ENDS), busy)]
