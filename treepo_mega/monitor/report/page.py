"""One self-contained HTML page: shell, tables, and charts by plotly, whose script is embedded once.

Everything from a run passes through `html.escape`, or through `charts.py` into blocks of JSON that cannot end
themselves. The page's policy (the meta tag) allows no request and no script but its own two, by their hashes: should
an escape be forgotten, what a model wrote still does nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

Cells = Sequence[str]
LONGEST_SHORT = 16
"""Characters of a cell that stays on one line."""
FOLDER = Path(__file__).parent


class Charts:
    """Collects figures while a page is written. `place` gives the HTML of one."""

    def __init__(self) -> None:
        self.figures: list[Mapping[str, Any]] = []

    def place(self, caption: str, figure: Mapping[str, Any] | None, *, about: str = "", tall: bool = False) -> str:
        """A captioned chart; nothing for None. `caption` and `about` are plain text."""
        if figure is None:
            return ""
        self.figures.append(figure)
        small = f" <small>{escape(about)}</small>" if about else ""
        kind = "chart tall" if tall else "chart"
        return (
            f'<figure><figcaption>{escape(caption)}{small}</figcaption><div class="{kind}" role="img" '
            f'aria-label="{escape(caption)}" data-figure="figure-{len(self.figures) - 1}"></div></figure>'
        )


def document(title: str, body: str, charts: Charts, *, refresh_s: float | None = None) -> str:
    """A page around `body`, which is HTML already, with the figures of `charts`. `refresh_s`: it reloads itself."""
    plotly = plotly_script()
    own = (FOLDER / "page.js").read_text(encoding="utf-8")
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    scripts = [plotly, own] if charts.figures or refresh_s else []
    allowed = " ".join(f"'sha256-{_digest(one)}'" for one in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"
    islands = "".join(
        f'<script type="application/json" id="figure-{place}">{island(figure)}</script>'
        for place, figure in enumerate(charts.figures)
    )
    refresh = "" if refresh_s is None else f' data-refresh="{refresh_s:g}"'
    code = "".join(f"<script>{one}</script>" for one in scripts)
    without = "<noscript><p>Charts need this page's own scripts. The tables hold the figures.</p></noscript>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{style}</style></head><body{refresh}>{without if scripts else ''}{body}{islands}{code}</body></html>\n"
    )


def island(value: Any) -> str:
    """JSON that stands in a page: no `<`, so that no text in it can end its block."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@cache
def plotly_script() -> str:
    """Plotly's own script, of the installed package."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def table(head: Cells, rows: Sequence[Cells], *, text: Sequence[int] = (), marked: Sequence[int] = ()) -> str:
    """Cells are HTML already. `text`: columns of prose, besides the first; `marked`: rows that are totals."""
    mark = ' class="text"'

    def kind(place: int, cell: str) -> str:
        if place in text:
            return mark
        return ' class="short"' if place and len(cell) <= LONGEST_SHORT else ""

    top = "".join(f"<th{mark if place in text else ''}>{name}</th>" for place, name in enumerate(head))
    lines = "".join(
        ('<tr class="total">' if at in marked else "<tr>")
        + "".join(f"<td{kind(place, cell)}>{cell}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for at, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def notes(found: Sequence[str]) -> str:
    """What is missing or doubtful, as a list; nothing without."""
    if not found:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(one)}</li>" for one in dict.fromkeys(found)) + "</ul>"
