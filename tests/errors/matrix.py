"""All bad inputs, in the order of docs/errors.md, and the tables that the page shows."""

from __future__ import annotations

from tests.errors import config_cases, data_cases, run_cases
from tests.errors.case import BadInput

CASES: tuple[BadInput, ...] = (*config_cases.CASES, *data_cases.CASES, *run_cases.CASES)


def render() -> str:
    """A table an area."""
    lines: list[str] = []
    for area in dict.fromkeys(case.area for case in CASES):
        lines += ["", f"### {area}", "", "| given | message says | what to do |", "|---|---|---|"]
        for case in CASES:
            if case.area == area:
                cells = (case.given, f"`{case.says}`", case.do)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip() + "\n"
