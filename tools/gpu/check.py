"""Run what only a GPU can show, in the order that settles most first. Behind `make test-gpu`.

    python tools/gpu/check.py --list                  stages, checks, minutes; needs no GPU
    python tools/gpu/check.py --budget-minutes 25     as many checks as fit; again: the rest
    python tools/gpu/check.py --stage torch --again   one stage, also what has a result
    python tools/gpu/check.py --render                docs/verification.md from gpu_report.json

Each result is appended to `gpu_report.json` as soon as it is there. A check with a result on these devices, with these
versions and this code, is left out; time-outs and what could not run are tried again.

Exit codes: 0, every check passed or says why it could not run; 1, some failed; 2, no GPU or bad input; 75, the budget
is used up and nothing failed so far; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.gpu import children, machine, plan, report
from treepo_mega.errors import TreepoError, nearest

OK, SOME_FAILED, CANNOT_RUN, BUDGET_USED = 0, 1, 2, 75
STOPPED = 130
LIMIT_FACTOR = 3

Runner = Callable[[plan.Check, float], children.Outcome]


class ArgumentError(TreepoError):
    """An option has a value that nothing is known for; the message names the nearest."""


def chosen(stages: Sequence[str]) -> list[plan.Check]:
    """The checks of these stages, all when none is named, in the order of the plan."""
    known = [stage.name for stage in plan.STAGES]
    for name in stages:
        if name not in known:
            raise ArgumentError(f"--stage {name}: expected one of {', '.join(known)}{nearest(name, known)}")
    return [check for name in known if not stages or name in stages for check in plan.CHECKS if check.stage == name]


def entry_of(check: plan.Check, outcome: children.Outcome, here: machine.Machine, source: str) -> report.Entry:
    """An entry of the report."""
    return {
        "check": check.name,
        "stage": check.stage,
        "status": outcome.status,
        "figure": outcome.figure,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": here.device,
        "gpus": len(here.devices),
        "driver": here.driver,
        "versions": here.versions,
        "source": source,
        "tail": outcome.tail,
    }


class Session:
    """One run of the command over the checks that have no result here yet."""

    def __init__(self, path: Path, here: machine.Machine, source: str, runner: Runner = children.run) -> None:
        self.path = path
        self.here = here
        self.source = source
        self.runner = runner
        self.left: list[plan.Check] = []
        self.results: dict[str, str] = {}

    def record(self, check: plan.Check, outcome: children.Outcome) -> None:
        """Say the outcome and append it. The same reason not to run, once more, is said but not written again."""
        said = "; ".join(filter(None, (outcome.figure, outcome.reason)))
        print(f"{outcome.status:>10}  {check.name}  {outcome.seconds:.0f} s  {said}", flush=True)
        self.results[check.name] = outcome.status
        last = report.last_here(report.load(self.path), check, self.here, self.source)
        same = last is not None and (last["status"], last["reason"]) == (outcome.status, outcome.reason)
        if outcome.status == children.NOT_RUN and same:
            return
        report.append(self.path, entry_of(check, outcome, self.here, self.source))

    def run(self, checks: Sequence[plan.Check], budget: float, again: bool) -> int:
        """Run them for at most `budget` seconds; the exit code. What does not fit is left for the next time."""
        end = time.monotonic() + budget
        for check in checks:
            entries = report.load(self.path)
            if not again and report.is_settled(entries, check, self.here, self.source):
                last = report.last_here(entries, check, self.here, self.source)
                assert last is not None
                self.results[check.name] = last["status"]
                print(f"{'kept':>10}  {check.name}  {last['status']} on {last['date'][:10]}", flush=True)
            elif reason := plan.missing(check, self.here.present, len(self.here.devices)):
                self.record(check, children.Outcome(children.NOT_RUN, "", reason, 0.0))
            elif check.minutes * 60 > end - time.monotonic():
                self.left.append(check)
            else:
                limit = min(LIMIT_FACTOR * check.minutes * 60, end - time.monotonic())
                print(f"{'running':>10}  {check.name}  at most {limit:.0f} s", flush=True)
                outcome = self.runner(check, limit)
                if outcome.status == children.TIMED_OUT and limit < LIMIT_FACTOR * check.minutes * 60:
                    outcome = replace(outcome, reason=f"the budget ended after {outcome.seconds:.0f} s")
                self.record(check, outcome)
        return self.conclude()

    def conclude(self) -> int:
        """Say the counts and what is left; the exit code."""
        statuses = list(self.results.values())
        counts = ", ".join(f"{statuses.count(name)} {name}" for name in children.STATUSES if name in statuses)
        print(f"{counts or 'nothing run'}; {self.path}")
        if self.left:
            minutes = sum(check.minutes for check in self.left)
            print(f"{len(self.left)} checks of {minutes:g} min did not fit the budget: run the same command again")
        if children.FAILED in statuses or children.TIMED_OUT in statuses:
            return SOME_FAILED
        return BUDGET_USED if self.left else OK


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="check.py", description="What only a GPU can show, in order.")
    parser.add_argument("--list", action="store_true", help="print stages, checks and minutes, and end")
    parser.add_argument("--render", action="store_true", help=f"write the table of {report.PAGE.name}, and end")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), metavar="N", help="begin nothing longer")
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this stage; may repeat")
    parser.add_argument("--again", action="store_true", help="also run what has a result here")
    parser.add_argument("--report", type=Path, default=report.REPORT, help="default: gpu_report.json of the checkout")
    return parser.parse_args(arguments)


def warn_of_rows() -> None:
    """Name the marked tests that no row runs: they would be forgotten in silence."""
    for node in plan.without_row():
        print(f"{node} has the mark gpu and no row in tools/gpu/plan.py: it is not run", file=sys.stderr)


def act(options: argparse.Namespace) -> int:
    """Do what the options say; the exit code."""
    checks = chosen(options.stage)
    if not options.budget_minutes > 0:
        raise ArgumentError(f"--budget-minutes {options.budget_minutes:g}: expected more than 0")
    warn_of_rows()
    if options.list:
        print(plan.listing(checks))
        return OK
    if options.render:
        if not options.report.exists():
            print(f"{options.report}: no such file; every check is shown as not run yet")
        report.render(report.PAGE, plan.CHECKS, report.load(options.report), machine.pins)
        return OK
    here = machine.look_in_a_child()
    if here.absence:
        print(f"There is no GPU here to check on: {here.absence}.")
        return CANNOT_RUN
    print(f"{here.device}, driver {here.driver}, {machine.with_pins(here.versions, machine.pins())}")
    return Session(options.report, here, report.source_digest()).run(checks, 60 * options.budget_minutes, options.again)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; a mistake of people is one message."""
    try:
        return act(parse(arguments))
    except TreepoError as error:
        print(error, file=sys.stderr)
        return CANNOT_RUN
    except KeyboardInterrupt:
        print("stopped; the results so far are kept, and the same command goes on with the rest", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
