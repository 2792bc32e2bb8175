"""Two small SVG charts: lines over steps, and one stacked bar of shares. No script, no library.

Text is escaped here, so that callers may pass run names as they are. Colours come from the page's style
sheet (`.c0` to `.c7`), which lets them follow a light or dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 460
HEIGHT = 200
LEFT = 56
RIGHT = 10
TOP = 8
BOTTOM = 24
COLOURS = 8
MAX_POINTS = 400
"""Points drawn per line; a longer series is thinned evenly (the first and last step stay)."""

Series = tuple[str, Sequence[int], Sequence[float]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that span [low, high]."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low = low - pad
        high = high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    # The slack is for rounding: a raw step a hair above 0.2 would get the next round number, 0.5.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis or a table: 1234567 -> 1.23M, 0.00012 -> 1.2e-04."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def line_chart(series: Sequence[Series], x_label: str = "step") -> str:
    """An SVG of (label, steps, values) lines, non-empty ones; points show their value when hovered over.

    `x_label` says what the steps are.
    """
    xs = [x for _, steps, _ in series for x in steps]
    ys = [y for _, _, values in series for y in values]
    x_low = min(xs)
    x_high = max(max(xs), min(xs) + 1)
    marks = ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = (marks[-1] - y) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(TOP + down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for mark in marks:
        y = place(x_low, mark)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{short(mark)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{x_low}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)} {max(xs)}</text>')
    for i, (label, steps, values) in enumerate(series):
        chosen = _thin(len(steps))
        points = [place(steps[at], values[at]) for at in chosen]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline class="line c{i % COLOURS}" points="{path}"/>')
        for at, (x, y) in zip(chosen, points, strict=True):
            tip = f"{label}: {x_label} {steps[at]}, {values[at]:.6g}"
            parts.append(
                f'<circle class="dot c{i % COLOURS}" cx="{x}" cy="{y}" r="2.5"><title>{escape(tip)}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def _thin(length: int) -> list[int]:
    if length <= MAX_POINTS:
        return list(range(length))
    return sorted({round(i * (length - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})


def share_bar(shares: Sequence[tuple[str, float]]) -> str:
    """One bar of (label, share) pieces, shares adding up to at most 1; a piece names itself when hovered over."""
    parts = [f'<svg class="bar" viewBox="0 0 {2 * WIDTH} 22" role="img">']
    left = 0.0
    for i, (label, share) in enumerate(shares):
        width = share * 2 * WIDTH
        box = f'x="{left:.1f}" y="0" width="{width:.1f}" height="22"'
        parts.append(
            f'<rect class="piece c{i % COLOURS}" {box}><title>{escape(f"{label}: {share:.1%}")}</title></rect>'
        )
        left += width
    return "".join([*parts, "</svg>"])
