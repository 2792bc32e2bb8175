r"""What looking at a run costs it: the telemetry sampler and a rank's status file, as shares of a step.

    python tools/bench/telemetry.py [--quick]

`cpu_share`: CPU seconds that a thread takes for one look, by the interval between two looks, as the defaults of
`logging.telemetry_interval_s` and `logging.status_interval_s` have it. `step_ratio`: steps of fixed work (products of
matrices, about `--step` seconds), alternately with and without both threads; the median of the ratios of neighbours, in
CPU seconds of the process and in wall time. The process has as many children as a rank has graders. Without a GPU the
gauges are those of the host; NVML's have to be measured where there is one.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from treepo_mega.config.run import LoggingConfig  # noqa: E402
from treepo_mega.monitor.nvml import open_telemetry  # noqa: E402
from treepo_mega.monitor.status import Status  # noqa: E402
from treepo_mega.monitor.telemetry import Telemetry, host_gauges  # noqa: E402

CHILDREN = 8
"""Graders of a rank."""


def cpu_seconds(look: Callable[[], object], times: int) -> float:
    """Median CPU seconds of this thread in one call, after one that warms up."""
    look()
    taken = []
    for _ in range(times):
        began = time.thread_time()
        look()
        taken.append(time.thread_time() - began)
    return statistics.median(taken)


def step_of(seconds: float) -> Callable[[], tuple[float, float]]:
    """A step that takes about `seconds` on a free core; it returns its (wall, CPU) seconds."""
    values = np.random.default_rng(0).random((256, 256))
    began = time.process_time()
    for _ in range(50):
        values @ values
    products = max(1, round(50 * seconds / (time.process_time() - began)))

    def step() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(products):
            values @ values
        return time.perf_counter() - wall, time.process_time() - cpu

    return step


def ratios(pairs: int, seconds: float, run_dir: Path, settings: LoggingConfig) -> dict[str, float]:
    """Medians of the ratio with / without both threads, over neighbouring steps in alternating order."""
    step = step_of(seconds)
    found: dict[str, list[float]] = {"wall": [], "cpu": []}
    for pair in range(pairs):
        taken: dict[bool, tuple[float, float]] = {}
        for watched in (True, False) if pair % 2 else (False, True):
            telemetry = open_telemetry(settings.telemetry_interval_s if watched else 0)
            interval = settings.status_interval_s if watched else 0
            status = Status(run_dir, rank=0, world=1, interval_s=interval)
            taken[watched] = step()
            telemetry.close()
            status.close("finished")
        for index, name in enumerate(("wall", "cpu")):
            found[name].append(taken[True][index] / taken[False][index])
    return {f"step_ratio_{name}": statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print the table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 looks and 4 pairs of steps instead of 100 and 20")
    parser.add_argument("--step", type=float, default=4.0, metavar="S", help="seconds of a step (default: 4)")
    args = parser.parse_args()
    if args.step <= 0:
        parser.error(f"--step {args.step:g}: expected a positive number of seconds")
    looks, pairs = (20, 4) if args.quick else (100, 20)
    settings = LoggingConfig()
    children = [subprocess.Popen(["sleep", "3600"]) for _ in range(CHILDREN)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            sampler = Telemetry(1.0, [])
            # Without its thread: the calls are timed here.
            sampler._gauges = host_gauges()
            status = Status(Path(folder), rank=0, world=1, interval_s=3600)
            sample_s = cpu_seconds(sampler.sample, looks)
            write_s = cpu_seconds(status._write, looks)
            status.close("finished")
            report: dict[str, float] = {
                "sample_cpu_s": sample_s,
                "sampler_cpu_share": sample_s / settings.telemetry_interval_s,
                "status_cpu_s": write_s,
                "status_cpu_share": write_s / settings.status_interval_s,
                **ratios(pairs, args.step, Path(folder), settings),
            }
    finally:
        for child in children:
            child.kill()
            child.wait()
    for name, value in report.items():
        print(f"{name:<20} {value:.6f}")
    print(json.dumps({"children": CHILDREN, "step_s": args.step, "pairs": pairs, **report}))


if __name__ == "__main__":
    main()
