"""`gpu_report.json`: one entry a run of a check, appended atomically, and the table of the docs that is made from it.

An entry has check, stage, status, figure, reason, seconds, date (UTC), device, gpus, driver, versions, source and tail.
`source` is a digest of the package and the tests: a result of other code is shown, and does not count as done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.gpu.children import FAILED, NOT_RUN, PARTLY, PASSED, STATUSES
from tools.gpu.machine import Machine, with_pins
from tools.gpu.plan import ROOT, STAGES, Check
from treepo_mega.errors import TreepoError
from treepo_mega.runtime.files import atomic_file

REPORT = ROOT / "gpu_report.json"
PAGE = ROOT / "docs" / "verification.md"
BEGIN = "<!-- gpu report: begin, written by tools/gpu/check.py --render -->"
END = "<!-- gpu report: end -->"
TEXTS = ("check", "stage", "status", "figure", "reason", "date", "device", "driver", "source", "tail")
SETTLED = (PASSED, PARTLY, FAILED)

Entry = dict[str, Any]
Pins = Callable[[str], dict[str, str]]
"""Of a version of Python, empty for the one that runs this: package -> the version that setup.py pins."""


class ReportError(TreepoError):
    """The report or the page cannot be used; the message names the file and the entry."""


def load(path: Path) -> list[Entry]:
    """The entries, oldest first; none when the file does not exist."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    # Also UnicodeDecodeError and JSONDecodeError.
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); move it away to begin a new report") from error
    if not isinstance(entries, list):
        raise ReportError(f"{path}: expected a list of entries; move it away to begin a new report")
    for number, entry in enumerate(entries, 1):
        fields = entry if isinstance(entry, dict) else {}
        absent = [name for name in TEXTS if not isinstance(fields.get(name), str)]
        if absent or not isinstance(fields.get("versions"), dict):
            raise ReportError(f"{path}, entry {number}: {(absent or ['versions'])[0]} is missing or of the wrong kind")
        if fields["status"] not in STATUSES:
            raise ReportError(f"{path}, entry {number}: status {fields['status']!r}; expected {', '.join(STATUSES)}")
    return list(entries)


def append(path: Path, entry: Entry) -> None:
    """Add an entry; a reader, or the next run after a kill, sees the report with it or without it."""
    entries = [*load(path), entry]
    with atomic_file(path) as file:
        json.dump(entries, file, indent=1)
        file.write("\n")


def source_digest(root: Path = ROOT) -> str:
    """Twelve digits of SHA-256 over every Python file of the package and the tests."""
    digest = hashlib.sha256()
    for folder in ("treepo_mega", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def same_place(entry: Entry, machine: Machine, source: str) -> bool:
    """Whether the entry is of these devices, this driver, these versions and this code."""
    here = (machine.device, machine.driver, machine.versions, source)
    return (entry["device"], entry["driver"], entry["versions"], entry["source"]) == here


def last_here(entries: Iterable[Entry], check: Check, machine: Machine, source: str) -> Entry | None:
    """The newest entry of a check at this place."""
    mine = [entry for entry in entries if entry["check"] == check.name and same_place(entry, machine, source)]
    return mine[-1] if mine else None


def is_settled(entries: Iterable[Entry], check: Check, machine: Machine, source: str) -> bool:
    """Whether to leave the check out: it ended here, well or badly. The others are tried again."""
    last = last_here(entries, check, machine, source)
    return last is not None and last["status"] in SETTLED


def cell(text: str) -> str:
    """Text from a report as the cell of a table: no mark-up of its own, at most 160 characters."""
    short = " ".join(text.split())
    short = short if len(short) <= 160 else short[:159] + "…"
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        short = short.replace(sign, safe)
    return short


def latest(entries: Iterable[Entry], check: Check) -> list[Entry]:
    """The newest entry of a check on each kind of device, in the order of the devices' first appearance.

    A check that could not run hides no result of the same device.
    """
    newest: dict[str, Entry] = {}
    for entry in entries:
        if entry["check"] == check.name and not (entry["status"] == NOT_RUN and entry["device"] in newest):
            newest[entry["device"]] = entry
    return list(newest.values())


def row(check: Check, entry: Entry | None, pinned: Pins) -> str:
    """One line of the table."""
    title = f"{check.settles}<br>`{check.name}`"
    if entry is None:
        return f"| {check.stage} | {title} | not run yet | | | |"
    said = "; ".join(filter(None, (entry["figure"], entry["reason"])))
    result = f"**{entry['status']}**: {cell(said)}" if said else f"**{entry['status']}**"
    versions = f"driver {entry['driver']}, {with_pins(entry['versions'], pinned(entry['versions'].get('python', '')))}"
    place = f"{cell(entry['device'])} | {cell(versions)}"
    return f"| {check.stage} | {title} | {result} | {place} | {entry['date'][:10]} |"


def table(checks: Sequence[Check], entries: Sequence[Entry], pinned: Pins) -> str:
    """The table of all checks in the order of the plan, with the newest result on each kind of device."""
    lines = ["| stage | check | result | device | versions | date |", "|---|---|---|---|---|---|"]
    for stage in STAGES:
        for check in (check for check in checks if check.stage == stage.name):
            found: list[Entry | None] = [*latest(entries, check)]
            lines += [row(check, entry, pinned) for entry in found or [None]]
    return "\n".join(lines)


def block_of(page: Path) -> tuple[str, str, str]:
    """The page before the table, the table, the page after it."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{page}: expected the lines {BEGIN!r} and {END!r}, each once and in this order")
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside.strip("\n"), after


def render(page: Path, checks: Sequence[Check], entries: Sequence[Entry], pinned: Pins) -> None:
    """Write the table into the page, between its two marks."""
    before, _, after = block_of(page)
    with atomic_file(page) as file:
        file.write(f"{before}{BEGIN}\n{table(checks, entries, pinned)}\n{END}{after}")
