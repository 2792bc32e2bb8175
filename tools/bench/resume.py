"""Does a killed run go on as if nothing had happened? Kill it, resume it, compare every number.

    python tools/bench/resume.py [--quick] [--ranks 2]

One uninterrupted run of the demo's recipe (TP over the ranks), then the same run stopped several times: by SIGKILL
of every process in the middle of a step, and by SIGTERM (which saves and leaves). Each time it is
resumed from its newest checkpoint. At the end every metric of every step must be bit-equal to the
uninterrupted run's, except those that depend on time (seconds, and who sampled what). --quick: one kill.

Last line, JSON: {"kills": n, "bit_equal": n, "steps": n, "first_difference": null or text}. bit_equal counts the
kills after which every step up to the next kill (or the end) was bit-equal. Exit status 1 when fewer than kills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import kill, metrics, run, start, wait, wait_for_step
from treepo_mega.monitor.registry import depends_on_time

SAVE_INTERVAL = 2
PLANNED_STOP = (0, 1, 75)
"""torchrun turns the ranks' status 75 (stopped on request) into 1."""


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without the ones that depend on time."""
    return {k: v for k, v in row.items() if not depends_on_time(k)}


def difference(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str | None:
    """The first number that differs, in words."""
    by_step = {row["step"]: timeless(row) for row in got}
    for row in map(timeless, expected):
        other = by_step.get(row["step"])
        if other is None:
            return f"step {row['step']} is missing"
        for key in sorted(row.keys() | other.keys()):
            if row.get(key) != other.get(key):
                return f"step {row['step']}, {key}: {row.get(key)!r} uninterrupted, {other.get(key)!r} resumed"
    return None


def main() -> int:
    """Run, kill, resume, compare; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one kill")
    p.add_argument("--ranks", type=int, default=2, help="tensor-parallel ranks")
    args = p.parse_args()
    plan = [(3, signal.SIGKILL)] if args.quick else [(3, signal.SIGKILL), (5, signal.SIGTERM), (8, signal.SIGKILL)]
    steps = plan[-1][0] + 2
    overrides = [
        f"train.num_rollouts={steps}",
        f"checkpoint.save_interval={SAVE_INTERVAL}",
        "train.lr_warmup_iters=2",
        "algo.kl_loss_coef=0.01",
        f"parallel.tensor_model_parallel_size={args.ranks}",
    ]
    with tempfile.TemporaryDirectory() as tmp:
        print(f"uninterrupted, {steps} steps ...", flush=True)
        expected = run(args.ranks, Path(tmp) / "whole", overrides, "the uninterrupted run")
        broken = Path(tmp) / "broken"
        broken.mkdir()
        log = broken / "log.txt"
        for step, number in plan:
            print(f"{signal.Signals(number).name} after step {step} ...", flush=True)
            process = start(args.ranks, broken, overrides, log)
            wait_for_step(process, broken, step, log)
            kill(process, number)
            if number != signal.SIGKILL:
                wait(process, log, "the run asked to stop", codes=PLANNED_STOP)
        print("resumed to the end ...", flush=True)
        wait(start(args.ranks, broken, overrides, log), log, "the resumed run")
        got = metrics(broken)
    bounds = [s for s, _ in plan] + [steps]
    equal = 0
    for a, b in itertools.pairwise(bounds):
        part = [row for row in expected if a < row["step"] <= b]
        equal += bool(part) and difference(part, got) is None
    first = difference(expected, got)
    print(f"{len(plan)} kills, {equal} resumed bit-equal; first difference: {first or 'none'}")
    print(json.dumps({"kills": len(plan), "bit_equal": equal, "steps": steps, "first_difference": first}))
    return 0 if equal == len(plan) and first is None else 1


if __name__ == "__main__":
    sys.exit(main())
