"""Jobs on a real Slurm: one that nobody disturbs, and one that meets a signal, a dead node and a full disk.

    bash tests/slurm/run.sh [--quick] [--keep DIR]

Two nodes x two ranks (`cluster.sh` boots them on this machine), `slurm/treepo_cpu.sh` as users submit it, and the real
trainer. The disturbed job gets, one after the other:

- USR1, as before a time limit: the ranks save, and the job requeues itself;
- a node whose processes all die at once: Slurm or the batch script requeues the job, which goes on when the node is
  back;
- a disk that is full when a checkpoint is written: the ranks fail, the job requeues itself, and goes on when there is
  room again.

Afterwards every metric of every step must be bit-equal to those of the undisturbed job, but for those that depend on
time; no process may be left on the nodes; and a cancelled job must leave none either.

Last line, JSON: {"layouts": [{"name", "steps", "restarts", "bit_equal", "seconds"}], "left": n}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

from resume import difference  # noqa: E402
from runs import BASE, metrics  # noqa: E402

CLUSTER = ROOT / "tests/slurm/cluster.sh"
CANNOT_RUN = 3
STEPS = 8
STOP_AFTER, KILL_AFTER, FULL_AFTER = 2, 4, 6
"""Finished steps at which each fault strikes."""
LAYOUTS = {
    "TP2 x DP2": ["parallel.tensor_model_parallel_size=2"],
    "PP2 x DP2": ["parallel.pipeline_model_parallel_size=2"],
}
DISK_MB = 64
MET = "2 nodes see one directory, have one set of versions"
TOLD = "a checkpoint could not be written: [Errno 28] No space left on device"
START_S = 420
"""A start may take so long before its first step is done: four ranks share the machine's cores."""
STEP_S = 120
DOWN_S = 60
"""Slurm notices a dead node after SlurmdTimeout (10 s), and holds a requeued job for some seconds more."""


class Failed(Exception):
    """A scenario did not go as it must; the message says what, and ends with the job's log."""


class Cluster:
    """The Slurm of `directory`; a context manager that boots and ends it."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.directory = directory
        self.nodes = nodes

    def __enter__(self) -> Cluster:
        try:
            self.call("up", str(self.nodes))
        except BaseException:
            self.call("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.call("down")

    def call(self, command: str, *arguments: str) -> str:
        """What a command of `cluster.sh` prints; SystemExit with its message when the machine cannot run it."""
        done = subprocess.run(
            ["bash", str(CLUSTER), command, str(self.directory), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == CANNOT_RUN:
            print(f"no Slurm on this machine: {done.stderr.strip()}", file=sys.stderr)
            raise SystemExit(CANNOT_RUN)
        if done.returncode:
            raise Failed(f"{command} {' '.join(arguments)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def slurm(self, *command: str) -> str:
        """What a Slurm command prints on the controller."""
        return self.call("on", "ctl", *command)


class Job:
    """A submitted job and its run directory."""

    def __init__(self, cluster: Cluster, run_dir: Path, overrides: list[str]) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        command = ["sbatch", "--parsable", f"--output={self.log}", "slurm/treepo_cpu.sh"]
        overrides = [*BASE, f"train.num_rollouts={STEPS}", "checkpoint.save_interval=2", *overrides]
        self.id = cluster.slurm(*command, *overrides, f"logging.run_dir={run_dir}").strip()

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        # squeue prints nothing for a job that has ended, which a loop cannot tell from an error.
        shown = self.cluster.slurm("scontrol", "show", "job", "-o", self.id)
        found = re.search(rf"\b{name}=(\S*)", shown)
        if found is None:
            raise Failed(f"job {self.id} has no {name}: {shown}")
        return found.group(1)

    def steps(self) -> int:
        """Steps whose metrics are written."""
        rows = metrics(self.run_dir) if (self.run_dir / "metrics.jsonl").is_file() else []
        return max((row["step"] for row in rows), default=0)

    def wait(self, what: str, seconds: float, done: Callable[[], bool]) -> None:
        """Poll until `done`; Failed with the log's end after `seconds`, or when the job has failed."""
        deadline = time.monotonic() + seconds
        while not done():
            state = self.field("JobState")
            if state in ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"):
                raise Failed(f"job {self.id} is {state} while waiting for {what}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Failed(f"job {self.id} is {state} after {seconds:.0f} s of waiting for {what}\n{self.tail()}")
            time.sleep(0.3)

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` steps are done."""
        self.wait(f"step {step}", START_S + step * STEP_S, lambda: self.steps() >= step)

    def wait_for_restart(self, count: int) -> None:
        """Wait until Slurm has started the job again `count` times."""
        runs = lambda: int(self.field("Restarts")) >= count and self.field("JobState") == "RUNNING"  # noqa: E731
        self.wait(f"restart {count}", STEP_S + DOWN_S, runs)

    def wait_for_end(self) -> None:
        """Wait until the job has completed."""
        self.wait("its end", START_S + STEPS * STEP_S, lambda: self.field("JobState") == "COMPLETED")

    def tail(self) -> str:
        """The end of the job's output."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else "(no output)"
        return "\n".join(text.splitlines()[-60:])


def disturb(job: Job, disk: Path) -> None:
    """Stop, kill and starve the job, and let it go on each time."""
    job.wait_for_step(STOP_AFTER)
    say(f"step {job.steps()}: USR1 to the batch script")
    # The exact stand-in for the signal before a time limit, which comes at a time of Slurm's choice.
    job.cluster.slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_restart(1)
    job.wait_for_step(KILL_AFTER)
    say(f"step {job.steps()}: SIGKILL to all of node2")
    job.cluster.call("kill", "node2")
    job.wait("the failure to be noticed", DOWN_S + STEP_S, lambda: job.field("JobState") != "RUNNING")
    job.cluster.call("start", "node2")
    job.wait_for_restart(2)
    job.wait_for_step(FULL_AFTER - 1)
    say(f"step {job.steps()}: the disk of the checkpoints is full")
    filler = disk / "filler"
    fill(filler)
    job.wait("the failure to be noticed", DOWN_S + START_S, lambda: job.field("JobState") != "RUNNING")
    filler.unlink()
    job.wait_for_end()
    if TOLD not in job.log.read_text(encoding="utf-8", errors="replace"):
        raise Failed(f"nothing in the job's log says {TOLD!r}\n{job.tail()}")


def fill(path: Path) -> None:
    """Write until the disk of `path` has no byte left."""
    block = bytes(1 << 16)
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError:
            return


def compare(name: str, overrides: list[str], cluster: Cluster, disk: Path, directory: Path) -> dict[str, Any]:
    """The row of a layout: an undisturbed and a disturbed job, and whether their numbers are equal."""
    started = time.monotonic()
    label = name.replace(" ", "").lower()
    say(f"{name}: undisturbed")
    calm = Job(cluster, directory / f"{label}-calm", overrides)
    calm.wait_for_end()
    if MET not in calm.log.read_text(encoding="utf-8", errors="replace"):
        raise Failed(f"the doctor did not say {MET!r}\n{calm.tail()}")
    say(f"{name}: disturbed")
    job = Job(cluster, directory / f"{label}-disturbed", [*overrides, f"checkpoint.save={disk / label}"])
    disturb(job, disk)
    wrong = difference(metrics(calm.run_dir), metrics(job.run_dir))
    if wrong:
        raise Failed(f"{name}: {wrong}\n{job.tail()}")
    left = cluster.call("left")
    if left:
        raise Failed(f"{name}: left running on the nodes:\n{left}")
    return {
        "name": name,
        "steps": STEPS,
        "restarts": int(job.field("Restarts")),
        "bit_equal": True,
        "seconds": round(time.monotonic() - started),
    }


def cancel(cluster: Cluster, directory: Path) -> None:
    """`scancel` in the middle of a start must leave no process behind."""
    say("a job that is cancelled while it starts")
    job = Job(cluster, directory / "cancelled", LAYOUTS["TP2 x DP2"])
    job.wait("its ranks", START_S, lambda: "treepo_mega.cli" in cluster.call("left"))
    cluster.slurm("scancel", job.id)
    deadline = time.monotonic() + DOWN_S
    while (left := cluster.call("left")) or job.field("JobState") != "CANCELLED":
        if time.monotonic() > deadline:
            raise Failed(f"{DOWN_S} s after scancel the job is {job.field('JobState')}, and there are left:\n{left}")
        time.sleep(0.3)


def say(text: str) -> None:
    """A line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    """Boot, run, compare, end; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="TP2 x DP2 alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR, and keep logs and metrics there")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="treepo-slurm-")) if arguments.keep is None else arguments.keep.resolve()
    # munged refuses a socket below a directory that others may not enter.
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    disk = directory / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    os.environ["TREEPO_PYTHON"] = sys.executable
    # The nodes are this machine: what they wait for is a free core.
    os.environ["TREEPO_MAX_FAILURES"] = "8"
    layouts = {"TP2 x DP2": LAYOUTS["TP2 x DP2"]} if arguments.quick else LAYOUTS
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "treepo-disk", str(disk)], check=True)
    try:
        # After the disk is there: hosts see the mounts of the time at which they were started.
        with Cluster(directory / "cluster", 2) as cluster:
            rows = [compare(name, overrides, cluster, disk, directory) for name, overrides in layouts.items()]
            cancel(cluster, directory)
    except Failed as failed:
        print(f"FAILED: {failed}", file=sys.stderr)
        return 1
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
    for row in rows:
        print(f"{row['name']}: {row['steps']} steps, {row['restarts']} restarts, bit-equal, {row['seconds']} s")
    print(json.dumps({"layouts": rows, "left": 0}))
    if arguments.keep is None:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
