"""Counts what tests start: Python children, groups of forked ranks, fork servers. `.ci/run` has a ceiling of them.

The file that `TREEPO_TEST_STARTS` names gets a line a start, `KIND WHAT`; without the variable nothing is counted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "TREEPO_TEST_STARTS"


def count_start(kind: str, what: str, times: int = 1) -> None:
    """Append `times` lines; one write, so that two test processes do not mix theirs."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{kind} {' '.join(what.split())}\n".encode() * times)
    os.close(file)


def _audit(event: str, args: tuple[object, ...]) -> None:
    """Every child that is a Python interpreter; torchrun counts for itself and each of its ranks."""
    if event != "subprocess.Popen" or not isinstance(args[1], list | tuple):
        return
    command = [os.fsdecode(part) if isinstance(part, bytes) else str(part) for part in args[1]]
    if not command or not Path(command[0]).name.startswith("python"):
        return
    times = 1
    if "--nproc-per-node" in command:
        times += int(command[command.index("--nproc-per-node") + 1])
    count_start("python", " ".join(command[1:4]), times)


def count_children() -> None:
    """Count this process's Python children from now on."""
    if os.environ.get(VARIABLE):
        sys.addaudithook(_audit)
