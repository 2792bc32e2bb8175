"""The report as Markdown: its tables, for an issue or a terminal. Everything from a run is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from treepo_mega.monitor.report.comparison import Comparison, side_by_side
from treepo_mega.monitor.report.machine import blocks
from treepo_mega.monitor.report.numbers import shown
from treepo_mega.monitor.report.sections import cost_rows, fit_cells, ratio, saving_text
from treepo_mega.monitor.report.slurm import Charged
from treepo_mega.monitor.report.summary import PHASES, RATES, Seen
from treepo_mega.monitor.report.table import ACCURACY, REWARD, trend


def plain(text: str) -> str:
    """Text that is neither markup nor a cell's end.

    >>> plain("<b>a|b`c")
    '&lt;b&gt;a\\\\|b\\\\`c'
    """
    out = escape(" ".join(text.split()), quote=False)
    for character in "\\|`*_[]":
        out = out.replace(character, "\\" + character)
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*out, *("| " + " | ".join(row) + " |" for row in rows)])


def render(runs: Sequence[Seen], baselines: Sequence[Seen], found: Comparison, charged: Charged) -> str:
    """The whole text."""
    everyone = [*runs, *baselines]
    parts = ["# treepo_mega report"]
    said = [note for seen in everyone for note in seen.figures["notes"]]
    parts += [f"- {plain(note)}" for note in dict.fromkeys([*said, *found.notes, *charged.problems, *charged.notes])]
    rows = []
    for seen in everyone:
        figures = seen.figures
        steps = "-" if figures["first_step"] is None else f"{figures['first_step']} to {figures['last_step']}"
        gains = (trend(figures, *REWARD), trend(figures, *ACCURACY), trend(figures, "eval/accuracy"))
        spent = (shown(figures["token_ratio"]), shown(figures["hours"]))
        rows.append((plain(figures["run"]), plain(figures["status"]), steps, *gains, *spent))
    head = ("run", "status", "steps", "reward", "accuracy", "eval accuracy", "token ratio", "hours")
    parts += ["", table(head, rows)]
    if baselines:
        parts += _comparison(found)
    for seen in everyone:
        if len(seen.run.steps):
            parts += _run(seen)
    if charged.jobs:
        jobs = [
            (plain(job.job), plain(job.name), plain(job.state), shown(job.elapsed_s), shown(job.gpu_hours))
            for job in charged.jobs
        ]
        parts += ["", "## What Slurm charged", "", table(("job", "name", "state", "seconds", "GPU-hours"), jobs)]
    return "\n".join(parts) + "\n"


def _comparison(found: Comparison) -> list[str]:
    head = ("", *(plain(arm.name) + (" (baseline)" if arm.is_baseline else "") for arm in found.arms))
    rows = [
        (plain(label), *(shown(value) + ("" if ratio is None else f" ({ratio:.2f} x)") for value, ratio in cells))
        for label, cells in side_by_side(found)
    ]
    parts = ["", "## Against the baseline", "", table(head, rows), ""]
    parts += [f"- {plain(saving_text(key, one, found.unit))}" for key, one in found.savings.items()]
    fits = [(plain(arm.name), axis, *fit_cells(one)) for arm in found.arms for axis, one in arm.fits.items()]
    return [*parts, "", table(("runs", "over", "A", "B", "C_mid", "R0", "what is not known"), fits)]


def _run(seen: Seen) -> list[str]:
    figures = seen.figures
    unit = figures["unit"]
    phases = [
        (plain(part["name"]), f"{part['share']:.1%}", *(shown(part[key]) for key in ("hours", "total", "p50", "p95")))
        for part in figures["phases"]
    ]
    bars = [(plain(bar["name"]), shown(bar["hours"]), plain(bar["note"])) for bar in figures["waterfall"]]
    rates = figures["throughput"]
    speeds = [(name, *(shown(rates[name][rate]) for rate in RATES)) for name in PHASES if name in rates]
    counted = [*figures["tokens"].items(), *figures["medians"].items(), *figures["totals"].items()]
    values = [(plain(name), shown(value)) for name, value in counted]
    values += [(plain(name), plain(value)) for name, value in cost_rows(figures)]
    heads = ("phase", "unique tokens/s per GPU", "flat", "TFLOP/s per GPU", "MFU", "HFU")
    parts = [
        *("", f"## Where the {unit} of {plain(figures['run'])} went", ""),
        table(("phase", "share", unit, "seconds", "p50", "p95"), phases),
        *("", table(("from perfect to measured", unit, "from"), bars)),
    ]
    if speeds:
        parts += ["", table(heads, speeds)]
    if figures["plan"]:
        planned = [
            (plain(row["what"]), shown(row["measured"]), shown(row["planned"]), ratio(row)) for row in figures["plan"]
        ]
        parts += ["", table(("against the plan", "measured", "planned", "measured / planned"), planned)]
    parts += ["", table(("figure", "value"), values)]
    for block in blocks(figures):
        cells = [[plain(cell) for cell in row] for row in block.rows]
        note = ["", plain(block.note)] if block.note else []
        parts += ["", f"### {block.title}", *note, "", table(block.head, cells)]
    if seen.stragglers.ranks:
        slow = [(f"rank {row.rank}", str(row.last), shown(row.waiting_s)) for row in seen.stragglers.ranks[:8]]
        parts += ["", table(("rank", "came last, rounds", "waiting, s"), slow)]
    return parts
