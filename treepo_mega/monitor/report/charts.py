"""The report's charts as plotly figures: plain dictionaries, in which every text from a run is escaped.

Plotly reads `<b>`, `<a href>` and entities in names and labels, so that names pass through `html.escape`. Colours of
text, grid and paper are the page's own and come from its script, which follows light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from treepo_mega.monitor.report.comparison import Arm, Comparison, curve
from treepo_mega.monitor.report.hours import RESTARTS
from treepo_mega.monitor.report.numbers import Array, bins
from treepo_mega.monitor.report.summary import PHASES, Seen
from treepo_mega.monitor.scaling_fit import value_at

Figure = dict[str, Any]
PALETTE = (
    "#2f7ed8",
    "#e07b39",
    "#3a9d5d",
    "#b04a8f",
    "#8a6fd1",
    "#c2a83e",
    "#4aa3a8",
    "#8b8f99",
    "#d1495b",
    "#6b8e23",
    "#5f4b8b",
    "#a0522d",
)
MOST_POINTS = 400
"""Of a line: more steps are averaged in bins."""
MOST_BARS = 120
DIGITS = 6
LONGEST_LABEL = 40
"""Characters."""


def colour(place: int) -> str:
    """Of a run or a phase, by its place."""
    return PALETTE[place % len(PALETTE)]


def label(name: str) -> str:
    """The end of a run's path, which tells runs apart, for a legend. HTML."""
    return escape(name if len(name) <= LONGEST_LABEL else "…" + name[1 - LONGEST_LABEL :])


def rounded(values: Array | Sequence[float]) -> list[float | None]:
    """For JSON: six digits, None for what is not finite."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]


def lines(series: Sequence[tuple[str, Any, Any]], x_title: str, *, place: int = 0) -> Figure:
    """(name, x, y) as lines over one another, each in its colour; thinned by averaging neighbours."""
    data = []
    for at, (name, xs, ys) in enumerate(series, place):
        xs = np.asarray(xs, np.float64)
        ys = np.asarray(ys, np.float64)
        if not len(xs):
            continue
        if len(xs) > MOST_POINTS:
            parts = bins(len(xs), MOST_POINTS)
            xs = np.array([xs[part].mean() for part in parts])
            ys = np.array([ys[part].mean() for part in parts])
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(xs) <= 60 else "lines",
                "name": label(name),
                "x": rounded(xs),
                "y": rounded(ys),
                "line": {"color": colour(at), "width": 1.8},
                "marker": {"size": 5},
                "hovertemplate": f"%{{y:.5g}} at {escape(x_title)} %{{x:.5g}}",
            }
        )
    return {"data": data, "layout": {"xaxis": {"title": {"text": escape(x_title)}}, "showlegend": len(data) > 1}}


def metric_chart(everyone: Sequence[Seen], metric: str) -> Figure | None:
    """A metric of all runs over steps; None where no run has it."""
    series = [(seen.run.name, *seen.run.series(metric)) for seen in everyone]
    # A run without the metric keeps its place, so that a run has one colour in all charts.
    return lines(series, "step") if any(len(steps) for _, steps, _ in series) else None


def stacked_hours(seen: Seen) -> Figure:
    """Seconds a step by phase, stacked over steps; the gaps that restarts left are in the table alone."""
    run = seen.run
    steps = run.steps
    parts = bins(len(steps), MOST_BARS)
    names = [part["name"] for part in seen.figures["phases"] if part["name"] != RESTARTS]
    data = []
    for place, name in enumerate(names):
        seconds = seen.spent.seconds[name]
        data.append(
            {
                "type": "bar",
                "name": escape(name),
                "x": [float(steps[part].mean()) for part in parts],
                "y": rounded([seconds[part].sum() / len(part) for part in parts]),
                "marker": {"color": colour(place)},
                "hovertemplate": f"{escape(name)}: %{{y:.4g}} s at step %{{x:.5g}}<extra></extra>",
            }
        )
    # The table below the chart has the colours' names.
    layout = {"showlegend": False, "barmode": "stack", "bargap": 0.08, "xaxis": {"title": {"text": "step"}}}
    return {"data": data, "layout": layout | {"yaxis": {"title": {"text": "seconds a step"}}}}


def waterfall_chart(seen: Seen) -> Figure:
    """The bars of `hours.waterfall`, from the top down."""
    bars = seen.figures["waterfall"]
    unit = seen.figures["unit"]
    data = [
        {
            "type": "waterfall",
            "orientation": "h",
            "y": [escape(bar["name"]) for bar in bars],
            "x": rounded([bar["hours"] for bar in bars]),
            "measure": ["absolute" if bar["is_total"] else "relative" for bar in bars],
            "text": [f"{bar['hours']:.3g}" for bar in bars],
            "textposition": "outside",
            "cliponaxis": False,
            "increasing": {"marker": {"color": "#e07b39"}},
            "decreasing": {"marker": {"color": "#3a9d5d"}},
            "totals": {"marker": {"color": "#2f7ed8"}},
            "hovertemplate": f"%{{y}}: %{{text}} {escape(unit)}<extra></extra>",
        }
    ]
    layout = {
        "showlegend": False,
        "xaxis": {"title": {"text": escape(unit)}},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "margin": {"r": 48},
    }
    return {"data": data, "layout": layout}


def throughput_chart(seen: Seen) -> Figure | None:
    """Tokens/s per GPU by phase, unique beside flat; None where nothing is known."""
    rates = seen.figures["throughput"]
    phases = [name for name in PHASES if name in rates]
    if not phases:
        return None
    data = []
    for place, kind in enumerate(("unique", "flat")):
        found = [rates[name][f"{kind}_tokens_per_s_per_gpu"] for name in phases]
        about = {"marker": {"color": colour(place)}, "hovertemplate": "%{x}: %{y:.5g} tokens/s<extra></extra>"}
        ys = [None if value is None else float(f"{value:.{DIGITS}g}") for value in found]
        data.append({"type": "bar", "name": kind, "x": phases, "y": ys} | about)
    return {"data": data, "layout": {"yaxis": {"title": {"text": "tokens/s per GPU"}}}}


def fit_chart(found: Comparison, axis: str) -> Figure | None:
    """Accuracy over compute: each run's points, and its arm's curve where the fit is identified."""
    data = []
    for arm in found.arms:
        # An arm has the colour of its first run.
        place = found.places[arm.members[0].run.name]
        if arm.metric is None or axis not in arm.fits:
            continue
        for at, seen in enumerate(arm.members):
            xs, ys = curve(seen, arm.metric, axis)
            drawn = lines([(arm.name, xs, ys)], "", place=place)["data"]
            for one in drawn:
                about = {"mode": "markers", "legendgroup": str(place), "showlegend": at == 0}
                data.append(one | about | {"hovertemplate": "%{y:.4g} at %{x:.4g}"})
        data += _fitted_line(arm, axis, place)
    if not data:
        return None
    metric = next(arm.metric for arm in found.arms if arm.metric)
    title = found.unit if axis == "hours" else "tokens, forwarded in sampling + 4 x packed"
    layout = {"xaxis": {"title": {"text": escape(title)}}, "yaxis": {"title": {"text": escape(metric)}}}
    return {"data": data, "layout": layout}


def _fitted_line(arm: Arm, axis: str, place: int) -> list[Figure]:
    one = arm.fits[axis]
    if one.problem is not None:
        return []
    xs = np.linspace(0, one.last_compute, 100)
    ys = value_at(xs, one.start, one.asymptote, one.exponent, one.midpoint)
    line = {"color": colour(place), "width": 2, "dash": "dash"}
    about = {"mode": "lines", "legendgroup": str(place), "showlegend": False, "hoverinfo": "skip"}
    return [{"type": "scatter", "x": rounded(xs), "y": rounded(ys), "line": line} | about]
