"""Does a long run grow? A thousand short steps in one process group: resident memory, open files and threads by step.

    python tools/bench/soak.py [--quick] [--steps 1000] [--minutes M] [--ranks 1] [--run-dir DIR] [--where STEP]

The demo's model and task, with little to do a step (2 prompts, 4 leaves) so that a thousand steps fit into half an hour
of one core; an evaluation and a checkpoint every 50 steps, with TensorBoard and status files. The bench looks at every
rank from outside (/proc) after each line of metrics. Growth is the slope of a straight line through resident memory of
the steps after the first hundred, a thousand steps long, the largest over ranks. Counts are the smallest and largest
after that hundred, at the same point of every period of 50 steps.

--minutes M: the run is ended after so long; what was seen until then counts, and "steps" says how many there were.
--where STEP: each rank writes what Python has allocated since step 100, the largest first, to DIR/tracemalloc_N.txt at
that step (slow). --trim N: every N steps each rank has glibc give back what is free in its heaps; what resident memory
is afterwards, and its slope, are printed: growth that this takes away was free memory. --quick: 40 steps, the first ten
left out; its slope says little. The growth by kind of mapping is printed too.

Last line, JSON: {"steps": n, "rss_growth_per_1000_steps": bytes, "fds": [least, most], "threads": [least, most],
"rss": [[step, bytes], ...]}. The latter of the rank that grew most, at 50 points.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from runs import ROOT, kill, metrics, tail

PERIOD = 50
FIRST = 100
DEADLINE_S = 6 * 3600.0
RECIPE = [
    "rollout.rollout_batch_size=2",
    "rollout.n_samples_per_prompt=4",
    "rollout.max_refills=0",
    *("rollout.oversample=1", "rollout.surplus=drop"),
    "train.num_steps_per_rollout=1",
    "train.max_tokens_per_gpu=512",
    "data.train=[{path: 'examples/tiny_reasoner/train.jsonl@[0:512]'}]",
    "eval.at_start=false",
    "eval.max_prompts=8",
    "eval.n_samples_per_prompt=1",
    "eval.greedy=false",
]


@dataclass
class Look:
    """A rank at one moment."""

    step: int
    rss: int
    fds: int
    threads: int
    children: int


def start(
    ranks: int, steps: int, period: int, run_dir: Path, where: int | None, trim: int | None
) -> subprocess.Popen[bytes]:
    """The run, under torchrun; its output goes to log.txt."""
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *(str(Path(__file__).with_name("soak_rank.py")), "train", "examples/tiny_cpu.yaml", *RECIPE),
        *(f"train.num_rollouts={steps}", f"checkpoint.save_interval={period}", f"eval.interval={period}"),
        *(f"parallel.tensor_model_parallel_size={ranks}", f"logging.run_dir={run_dir}"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    if where is not None:
        env["TREEPO_SOAK_WHERE"] = f"{FIRST} {where} {run_dir}"
    if trim is not None:
        env["TREEPO_SOAK_TRIM"] = f"{trim} {run_dir}"
    with (run_dir / "log.txt").open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)


def look_at(rank: psutil.Process, step: int) -> Look:
    """What /proc says of a rank; its children are graders and helpers."""
    with rank.oneshot():
        children = len(rank.children(recursive=True))
        return Look(step, rank.memory_info().rss, rank.num_fds(), rank.num_threads(), children)


def kinds_of_memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind of mapping."""
    found: dict[str, int] = {}
    kind = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        name = line.split()
        if "-" in name[0] and not name[0].endswith(":"):
            path = name[5] if len(name) > 5 else ""
            kind = path if path.startswith("[") else "anonymous" if not path else "files"
            kind = "shared" if path.startswith("/dev/shm") or "(deleted)" in line else kind
        elif name[0] == "Rss:":
            found[kind] = found.get(kind, 0) + 1024 * int(name[1])
    return found


def watch(process: subprocess.Popen[bytes], run_dir: Path, limit_s: float | None = None) -> dict[int, list[Look]]:
    """Looks by process id of the rank, one a step that was seen, until the run ends or `limit_s` seconds have passed.

    Raises RuntimeError when the run fails.
    """
    looks: dict[int, list[Look]] = {}
    kinds: dict[int, dict[str, int]] = {}
    launcher = psutil.Process(process.pid)
    started = time.monotonic()
    deadline = started + DEADLINE_S
    seen, size = 0, 0
    path = run_dir / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        if limit_s is not None and time.monotonic() > started + limit_s:
            kill(process)
            return looks
        if time.monotonic() > deadline:
            kill(process)
            raise RuntimeError(f"the run did not end in {DEADLINE_S:.0f} s:\n{tail(run_dir / 'log.txt')}")
        if not path.exists() or path.stat().st_size == size:
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 20_000))
            lines = file.read().split(b"\n")
        if len(lines) < 2 or not lines[-2].startswith(b"{"):
            continue
        step = int(json.loads(lines[-2])["step"])
        if step > seen:
            seen = step
            try:
                for rank in launcher.children():
                    looks.setdefault(rank.pid, []).append(look_at(rank, step))
                    if step >= FIRST and step % PERIOD == 0:
                        now = kinds_of_memory(rank.pid)
                        since = kinds.setdefault(rank.pid, now)
                        grown = {kind: (size - since.get(kind, 0)) / 2**20 for kind, size in now.items()}
                        text = ", ".join(f"{kind} {mib:+.1f}" for kind, mib in sorted(grown.items()) if abs(mib) > 0.05)
                        print(f"step {step}, process {rank.pid}: MiB since {FIRST}: {text or 'none'}", flush=True)
            except psutil.NoSuchProcess:
                break
    if process.wait(120):
        raise RuntimeError(f"the run ended with {process.returncode}:\n{tail(run_dir / 'log.txt')}")
    return looks


def growth(looks: list[Look]) -> float:
    """Slope of resident memory, bytes per 1000 steps."""
    steps = np.array([look.step for look in looks], np.float64)
    slope, _ = np.polyfit(steps, np.array([look.rss for look in looks], np.float64), 1)
    return float(slope) * 1000


def summary(looks: dict[int, list[Look]], done: int, *, first: int, period: int) -> dict[str, Any]:
    """What the looks say of the steps after the `first`; prints the table of the rank that grew most."""
    # At the end graders leave and files close.
    later = [[look for look in of_rank if first < look.step < done] for of_rank in looks.values()]
    most = max(later, key=growth)
    # At one point of the period: a checkpoint's files are open while it is written.
    same = [look for of_rank in later for look in of_rank if look.step % period == period // 2]
    print(f"{'step':>6} {'resident, MiB':>14} {'open files':>11} {'threads':>8} {'children':>9}")
    for look in most[:: max(1, len(most) // 25)]:
        print(f"{look.step:>6} {look.rss / 2**20:>14.1f} {look.fds:>11} {look.threads:>8} {look.children:>9}")
    return {
        "steps": done,
        "rss_growth_per_1000_steps": round(growth(most)),
        "fds": [min(look.fds for look in same), max(look.fds for look in same)],
        "threads": [min(look.threads for look in same), max(look.threads for look in same)],
        "rss": [[look.step, look.rss] for look in most[:: max(1, len(most) // 50)]],
    }


def main() -> int:
    """Run, look, print; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="40 steps")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--minutes", type=float, help="end the run after so many minutes, whatever the step")
    p.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks")
    p.add_argument("--run-dir", type=Path, help="default: a temporary directory")
    p.add_argument("--where", type=int, metavar="STEP", help="say then what Python allocated after step 100")
    p.add_argument("--trim", type=int, metavar="N", help="have glibc give back what is free every N steps")
    args = p.parse_args()
    limit_s = None if args.minutes is None else 60 * args.minutes
    steps, first, period = (40, 10, 10) if args.quick else (args.steps, FIRST, PERIOD)
    with tempfile.TemporaryDirectory(prefix="soak") as tmp:
        run_dir = args.run_dir or Path(tmp) / "run"
        looks = watch(start(args.ranks, steps, period, run_dir, args.where, args.trim), run_dir, limit_s)
        done = int(metrics(run_dir)[-1]["step"])
        trimmed = [path.read_text(encoding="utf-8") for path in sorted(run_dir.glob("trim_*.txt"))]
    if done < first + 2 * period:
        raise SystemExit(f"{done} steps are too few for a slope: it needs {first + 2 * period}")
    for number, text in enumerate(trimmed):
        rows = np.array([line.split() for line in text.splitlines()], np.float64)
        rows = rows[rows[:, 0] > first]
        slope = np.polyfit(rows[:, 0], rows[:, 2], 1)[0] * 1000 / 2**20 if len(rows) > 2 else float("nan")
        print(f"rank {number}, after giving back: {slope:.1f} MiB per 1,000 steps; readings {rows[:, 2] / 2**20}")
    found = summary(looks, done, first=first, period=period)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
