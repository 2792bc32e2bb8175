"""What a check found, and how findings are shown."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class State(enum.Enum):
    """How bad it is. A run starts with warnings, but not with failures."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. `remedy` says what to do; it is empty only where there is nothing to do."""

    check: str
    state: State
    found: str
    remedy: str = ""


def table(host: str, findings: Sequence[Finding], *, all_of_them: bool = True) -> list[str]:
    """The findings as aligned lines; without `all_of_them` only those that are not fine.

    >>> print("\\n".join(table("node7", [Finding("clock", State.FAIL, "9.0 s ahead", "start an NTP client")])))
    node7  FAIL  clock  9.0 s ahead: start an NTP client
    """
    shown = [each for each in findings if all_of_them or each.state is not State.OK]
    width = max((len(each.check) for each in shown), default=0)
    return [
        f"{host}  {each.state.value:4}  {each.check:{width}}  {each.found}{': ' if each.remedy else ''}{each.remedy}"
        for each in shown
    ]
