"""One check as a child: pytest over its node, with a time limit; what its JUnit file says becomes an outcome.

A test leaves a figure with pytest's `record_property(name, value)`. Without one the figure is the count of tests.
Skipped tests never count as passed: all of them skipped is "not run", some of them "partly run", with the reasons.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tools.gpu.plan import ROOT, Check

PASSED = "passed"
PARTLY = "partly run"
FAILED = "failed"
TIMED_OUT = "timed out"
NOT_RUN = "not run"
STATUSES = (PASSED, PARTLY, FAILED, TIMED_OUT, NOT_RUN)
TAIL = 4000
NO_TESTS = 5


@dataclass(frozen=True)
class Outcome:
    """`figure` is what was measured or counted, `reason` why it did not pass, `tail` the end of a failure's output."""

    status: str
    figure: str
    reason: str
    seconds: float
    tail: str = ""


def command_of(check: Check, junit: Path, limit: float) -> list[str]:
    """The child's command. pytest's own deadline for a test is the check's: its 300 s may be too few here."""
    selection = [*(["-k", check.keyword] if check.keyword else []), *(["-m", "gpu"] if check.marked else [])]
    options = ["-p", "no:cacheprovider", "-o", f"timeout={limit:.0f}", f"--junitxml={junit}", "-q"]
    return [sys.executable, "-m", "pytest", check.node, *selection, *options]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_child(command: Sequence[str], limit: float, folder: Path, log: Path) -> int | None:
    """The child's exit status, its output in `log`; None when it passed `limit` seconds and was ended."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process)
            return None
        # Ctrl-C does not reach a session of its own: a child left behind would keep the GPU.
        except BaseException:
            stop(process)
            raise


def first_line(element: ElementTree.Element) -> str:
    """The message of a failure or a skip, in one line."""
    text = element.get("message") or element.text or ""
    return " ".join((text.strip().splitlines() or [""])[0].split())


def read_junit(path: Path, status: int, seconds: float, tail: str) -> Outcome:
    """The outcome of a child that ended by itself with exit status `status`."""
    if status == NO_TESTS:
        return Outcome(FAILED, "", "no test of this name was selected", seconds, tail)
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return Outcome(FAILED, "", f"no report from pytest: {ended}", seconds, tail)
    wrong = [element for case in cases for kind in ("failure", "error") for element in case.findall(kind)]
    skips = [element for case in cases for element in case.findall("skipped")]
    measured = [f"{item.get('name')} {item.get('value')}" for case in cases for item in case.iter("property")]
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    passed = len(cases) - bad - len(skips)
    figure = "; ".join(measured) or f"{passed} of {len(cases)} tests passed"
    reasons = "; ".join(dict.fromkeys(first_line(element) for element in wrong or skips))
    if wrong or status != 0:
        return Outcome(FAILED, figure, reasons or f"exit status {status}", seconds, tail)
    if passed == 0:
        return Outcome(NOT_RUN, "", reasons or "no test ran", seconds)
    return Outcome(PARTLY if skips else PASSED, figure, reasons, seconds)


def run(check: Check, limit: float, folder: Path = ROOT) -> Outcome:
    """Run a check from `folder` for at most `limit` seconds."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        junit = Path(scratch) / "junit.xml"
        log = Path(scratch) / "log"
        begin = time.monotonic()
        status = run_child(command_of(check, junit, limit), limit, folder, log)
        seconds = time.monotonic() - begin
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        if status is None:
            return Outcome(TIMED_OUT, "", f"passed its limit of {limit:.0f} s", seconds, tail)
        return read_junit(junit, status, seconds, tail)
