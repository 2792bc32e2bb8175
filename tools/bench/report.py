"""How long `treepo-mega report` takes and how much memory it needs for a long run of many ranks.

    python tools/bench/report.py [--steps 10000] [--ranks 64] [--traced 500]
    python tools/bench/report.py --quick

The run is made up: lines of metrics.jsonl with every number of a recorded demo step and of a GPU node's telemetry, each
step drawn anew, and a timeline of `--traced` steps for each rank. The report runs in a process of its own, as a user
starts it. Its sums are compared with those that were drawn: tokens exactly, seconds to a millionth. Exit status 1: a
sum is wrong, the report took more than 60 CPU seconds, or its process more than 1 GiB.

Last line, JSON: {"steps", "ranks", "traced", "metrics_mb", "trace_mb", "seconds", "cpu_s", "peak_mib", "page_mb",
"points" (numbers in the page's charts), "sums_agree"}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "monitor" / "demo_run" / "metrics.jsonl"
MOST_CPU_S = 60.0
MOST_MIB = 1024.0
COUNTED = ("rollout/generated_tokens", "tree/unique_tokens", "tree/flat_tokens", "tree/leaves")
PHASES = ("rollout", "reward", "advantage", "old_logprobs", "ref_logprobs", "update", "reshard")
GAUGES = ("utilization", "memory_used_gib", "power_w", "sm_clock_mhz", "temperature_c", "throttled_share")


def write_metrics(path: Path, steps: int, ranks: int, rng: random.Random) -> dict[str, float]:
    """metrics.jsonl of `steps` lines; returns the sums of what was drawn."""
    lines = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    pattern = {name: value for name, value in lines[1].items() if name not in ("step", "time")}
    sums = dict.fromkeys((*COUNTED, *(f"timing_s/{phase}" for phase in PHASES)), 0.0)
    now = 1.7e9
    with path.open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            row = {name: value * rng.uniform(0.8, 1.2) for name, value in pattern.items()}
            row |= {name: rng.randrange(10_000, 90_000) for name in COUNTED}
            row |= {f"timing_s/{phase}": rng.uniform(1.0, 20.0) for phase in PHASES}
            row |= {f"gpu/{gauge}_{kind}": rng.uniform(0.0, 700.0) for gauge in GAUGES for kind in ("mean", "max")}
            seconds = sum(row[f"timing_s/{phase}"] for phase in PHASES) + 0.5
            rate = row["perf/packed_tokens"] / seconds / ranks
            row |= {"timing_s/step": seconds, "perf/step_s": seconds, "perf/unique_tokens_per_s_per_gpu": rate}
            row |= {"gpu/energy_kj": rng.uniform(100, 900), "perf/update_mfu": rng.uniform(0.3, 0.4)}
            row["rollout/accuracy_policy"] = 0.2 + 0.6 / (1 + (steps / 5 / step) ** 1.5) + rng.gauss(0, 0.02)
            now += seconds + 0.01
            file.write(json.dumps({"step": step, "time": round(now, 3), **row}) + "\n")
            for name in sums:
                sums[name] += row[name]
    return sums


def write_traces(folder: Path, steps: int, ranks: int, rng: random.Random) -> None:
    """A timeline a rank, of `steps` steps; rank 5 is slow."""
    folder.mkdir()
    for rank in range(ranks):
        events = []
        for _ in range(steps):
            for name in (*PHASES, "sampling", "waiting for other engines", "exchange"):
                seconds = rng.uniform(0.0, 0.1) if rank == 5 and name.startswith("waiting") else rng.uniform(1.0, 5.0)
                event = {"name": name, "ph": "X", "ts": 1e15, "dur": seconds * 1e6, "pid": rank, "tid": 0}
                events.append(event)
        (folder / f"rank_{rank}.json").write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


def measured(run: Path) -> dict[str, float]:
    """Wall seconds, CPU seconds and the largest resident memory of the report's process."""
    command = [sys.executable, "-m", "treepo_mega.cli", "report", str(run)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    # wait4 and not wait: it tells what this one child used.
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


def sums_agree(run: Path, sums: dict[str, float], traced: int) -> bool:
    """Whether the report's own figures are what was drawn, and the slow rank is named."""
    figures = json.loads((run / "report.json").read_text(encoding="utf-8"))["runs"][0]
    tokens = {"rollout/generated_tokens": "generated", "tree/unique_tokens": "unique", "tree/flat_tokens": "flat"}
    same = all(figures["tokens"][short] == sums[name] for name, short in tokens.items())
    same &= figures["cost"]["trajectories"] == sums["tree/leaves"]
    seconds = {part["name"]: part["total"] for part in figures["phases"]}
    same &= all(abs(seconds[phase] / sums[f"timing_s/{phase}"] - 1) < 1e-6 for phase in PHASES)
    slow = figures["stragglers"]["ranks"]
    return same and (not traced or (slow[0]["rank"], slow[0]["last"]) == (5, traced))


def points(page: str) -> int:
    """Numbers in the blocks of the page's charts."""
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    return sum(len(re.findall(r"[\d.]+(?=[,\]])", block)) for block in blocks)


def bench(steps: int, ranks: int, traced: int) -> dict[str, Any]:
    """Draw a run, report on it, compare."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        run.mkdir()
        sums = write_metrics(run / "metrics.jsonl", steps, ranks, rng)
        write_traces(run / "trace", traced, ranks, rng)
        (run / "config.yaml").write_text(f"train: {{num_rollouts: {steps}}}\n", encoding="utf-8")
        used = measured(run)
        page = (run / "report.html").read_text(encoding="utf-8")
        return {
            "steps": steps,
            "ranks": ranks,
            "traced": traced,
            "metrics_mb": (run / "metrics.jsonl").stat().st_size / 1e6,
            "trace_mb": sum(path.stat().st_size for path in (run / "trace").iterdir()) / 1e6,
            **used,
            "page_mb": len(page.encode()) / 1e6,
            "points": points(page),
            "sums_agree": sums_agree(run, sums, traced),
        }


def main() -> int:
    """Print the table and the JSON line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--traced", type=int, default=500, help="steps with a timeline by rank (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="200 steps of 8 ranks, 20 of them traced")
    args = parser.parse_args()
    row = bench(200, 8, 20) if args.quick else bench(args.steps, args.ranks, args.traced)
    print(f"{row['steps']} steps of {row['ranks']} ranks, {row['traced']} with timelines")
    print(f"  read       {row['metrics_mb']:8.1f} MB of metrics, {row['trace_mb']:.1f} MB of timelines")
    print(f"  took       {row['seconds']:8.1f} s, {row['cpu_s']:.1f} of CPU (at most {MOST_CPU_S:g})")
    print(f"  memory     {row['peak_mib']:8.0f} MiB (at most {MOST_MIB:g})")
    print(f"  page       {row['page_mb']:8.1f} MB, {row['points']} numbers in its charts")
    print(f"  sums agree {row['sums_agree']!s:>8}")
    print(json.dumps(row))
    return 0 if row["sums_agree"] and row["cpu_s"] < MOST_CPU_S and row["peak_mib"] < MOST_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
