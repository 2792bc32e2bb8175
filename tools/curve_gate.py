"""`make test-curves`: one short demo whose reward, entropy, mismatch and CPU time stay inside a recorded corridor.

    python tools/curve_gate.py                     run the demo for STEPS steps and hold it
    python tools/curve_gate.py --hold RUN_DIR      hold a run that is finished
    python tools/curve_gate.py --record 1 2 3      run these seeds and write the corridor (after an intended change)

The unit tests say that each part is right; this says that the whole still learns, at its price. It is a run of a
minute or two, so it is for the night and for releases, not for every commit.

A corridor has a lower and an upper end for each step of a curve. Both come from recorded runs of several seeds: their
smallest and largest value, widened by the curve's margin (CURVES), after a mean over WINDOW steps. A change that only
draws other samples stays inside; one that learns less, collapses, or computes something else leaves it. CPU seconds
have no lower end, and a wide upper one, for another machine is not a regression: record anew where it is slower.

Exit status: 0 inside, 1 outside (each curve named with step, value and corridor), 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORRIDOR = ROOT / "docs" / "results" / "curves" / "demo.json"
CONFIG = "examples/tiny_cpu.yaml"
STEPS = 10
WINDOW = 3
OVERRIDES = [
    f"train.num_rollouts={STEPS}",
    "eval.at_start=false",
    "eval.at_end=false",
    "eval.interval=1000",
    "checkpoint.enabled=false",
    "logging.tensorboard=false",
    "logging.progress=false",
]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """How far a corridor reaches past the recorded runs, and which ends it has."""

    absolute: float = 0.0
    relative: float = 0.0
    has_lower_end: bool = True

    def ends(self, values: Sequence[float]) -> tuple[float | None, float]:
        """Lower and upper end for one step from the values of the recorded runs."""
        low = min(values) - self.absolute - self.relative * abs(min(values))
        high = max(values) + self.absolute + self.relative * abs(max(values))
        return (round(low, 8) if self.has_lower_end else None), round(high, 8)


CURVES = {
    "rollout/accuracy": Curve(absolute=0.06),
    "train/entropy": Curve(relative=0.25),
    # The largest of thousands of differences of rounding: only its order of magnitude says something.
    "rollout/logprob_abs_diff_max": Curve(relative=9.0, has_lower_end=False),
    "cpu_s/step": Curve(relative=0.75, has_lower_end=False),
}


@dataclass(frozen=True)
class Departure:
    """A curve that left its corridor: the first step at which it did."""

    curve: str
    step: int
    value: float | None
    low: float | None
    high: float

    def __str__(self) -> str:
        value = "missing" if self.value is None else f"{self.value:.4g}"
        low = "-inf" if self.low is None else f"{self.low:.4g}"
        return f"{self.curve}: {value} at step {self.step}, corridor {low} to {self.high:.4g}"


def smoothed(rows: Rows, name: str) -> dict[int, float]:
    """Step -> mean of the curve over the WINDOW steps that end there; steps without a value are left out."""
    values = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    out = {}
    for step in values:
        window = [values[at] for at in range(step - WINDOW + 1, step + 1) if at in values]
        out[step] = sum(window) / len(window)
    return out


def corridor_of(runs: dict[int, Rows]) -> dict[str, Any]:
    """The corridor of recorded runs, seed -> rows; ValueError when a run lacks a curve at some step."""
    curves: dict[str, Any] = {}
    for name, curve in CURVES.items():
        of_runs = {seed: smoothed(rows, name) for seed, rows in runs.items()}
        ends = []
        for step in range(1, STEPS + 1):
            lacking = [seed for seed, values in of_runs.items() if step not in values]
            if lacking:
                raise ValueError(f"the run of seed {lacking[0]} has no {name} at step {step}")
            ends.append(curve.ends([values[step] for values in of_runs.values()]))
        curves[name] = {"low": [low for low, _ in ends], "high": [high for _, high in ends]}
    return {"config": CONFIG, "overrides": OVERRIDES, "window": WINDOW, "seeds": sorted(runs), "curves": curves}


def departures(rows: Rows, corridor: dict[str, Any]) -> list[Departure]:
    """The first departure of each curve that leaves its corridor; a missing value is one."""
    found = []
    for name, ends in corridor["curves"].items():
        values = smoothed(rows, name)
        for step, (low, high) in enumerate(zip(ends["low"], ends["high"], strict=True), 1):
            value = values.get(step)
            if value is None or value > high or (low is not None and value < low):
                found.append(Departure(name, step, value, low, high))
                break
    return found


def read(run_dir: Path) -> Rows:
    """The steps of a run."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(seed: int) -> Rows:
    """One short demo, one process with one thread; RuntimeError with the end of its log when it fails."""
    with tempfile.TemporaryDirectory() as tmp:
        run_dir = Path(tmp) / "run"
        command = [sys.executable, "-m", "treepo_mega.cli", "train", CONFIG, *OVERRIDES, f"train.seed={seed}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        log = Path(tmp) / "log.txt"
        with log.open("wb") as out:
            status = subprocess.run(
                [*command, f"logging.run_dir={run_dir}"], cwd=ROOT, env=env, stdout=out, stderr=out, timeout=1800
            ).returncode
        if status:
            end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            raise RuntimeError(f"the demo ended with status {status}:\n" + "\n".join(end))
        return read(run_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Hold a run or record the corridor; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--hold", type=Path, metavar="RUN_DIR", help="hold a finished run")
    what.add_argument("--record", type=int, nargs="+", metavar="SEED", help="run these seeds, write the corridor")
    p.add_argument("--seed", type=int, default=1, help="train.seed of the run that is held")
    p.add_argument("--corridor", type=Path, default=CORRIDOR)
    args = p.parse_args(argv)
    if args.record:
        corridor = corridor_of({seed: run(seed) for seed in args.record})
        args.corridor.parent.mkdir(parents=True, exist_ok=True)
        args.corridor.write_text(json.dumps(corridor, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.corridor} from seeds {args.record}")
        return 0
    for needed in (args.corridor, *([args.hold / "metrics.jsonl"] if args.hold else [])):
        if not needed.is_file():
            print(f"no {needed}", file=sys.stderr)
            return 2
    corridor = json.loads(args.corridor.read_text(encoding="utf-8"))
    rows = read(args.hold) if args.hold else run(args.seed)
    found = departures(rows, corridor)
    for departure in found:
        print(departure, file=sys.stderr)
    if not found:
        held = ", ".join(f"{name} {smoothed(rows, name)[STEPS]:.4g}" for name in corridor["curves"])
        print(f"inside the corridor at all {STEPS} steps; at the last one {held}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
