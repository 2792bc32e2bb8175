"""Counts what tests start, and holds the counts against a ceiling: `python tests/starts.py FILE` in `.ci/run`.

The file that `TREEPO_TEST_STARTS` names gets a line a start, `KIND WHAT`; without the variable nothing is counted.
Seconds depend on the machine, so no check is about them. A start of Python with torch is what costs a lane its time,
and a count is the same everywhere.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

VARIABLE = "TREEPO_TEST_STARTS"
GRADERS = (
    *(f"-P -m treepo_mega.data.rewards.{name}" for name in ("worker", "flights")),
    *(f"-P -m treepo_mega.environment.{name}" for name in ("worker", "keeper")),
)
"""Light processes without torch: for plain verifiers, for async ones and servers, and for the tools of environments."""
CEILING = {"python": 202, "grader": 250, "rank-group": 74}
"""Starts of both lanes together: Python children, the pools' light ones, and groups of forked ranks.

A new test shares what is started already (tests/README.md). Raise a number only with the reason in the commit.
"""


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


def kind_of(line: str) -> str:
    """Which ceiling a line of the file counts against."""
    kind, _, what = line.partition(" ")
    return "grader" if kind == "python" and what.startswith(GRADERS) else kind


def report(path: Path) -> list[str]:
    """Print the counts of the file at `path`; what is above its ceiling, as one message each."""
    lines = path.read_text().splitlines()
    counts = Counter(map(kind_of, lines))
    for kind, ceiling in CEILING.items():
        print(f"{counts[kind]:4d} of at most {ceiling} starts of kind {kind}")
    return [
        f"tests start {counts[kind]} of kind {kind}; the ceiling is {ceiling}. Share a start that is there already: "
        "tests/README.md says how"
        for kind, ceiling in CEILING.items()
        if counts[kind] > ceiling
    ]


if __name__ == "__main__":
    problems = report(Path(sys.argv[1]))
    print("\n".join(problems), file=sys.stderr)
    sys.exit(bool(problems))
