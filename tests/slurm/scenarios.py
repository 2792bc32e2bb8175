"""Jobs on a real Slurm: one that nobody disturbs, and one that meets a time limit, a dead node and a full disk.

    bash tests/slurm/run.sh [--quick] [--only LAYOUT|'lost node'|'stop file'] [--keep DIR]

Jobs of two nodes x two ranks on three nodes (`cluster.sh` boots them on this machine), `slurm/treepo_cpu.sh` as users
submit it, and the real trainer. The disturbed job gets, one after the other:

- a time limit: Slurm sends USR1 before it, the ranks save, and the job requeues itself;
- a node whose processes all die at once: Slurm or the batch script requeues the job, which goes on on another node;
- a disk that is full when a checkpoint is written: the ranks fail, the job requeues itself, and goes on when there is
  room again.

Afterwards every metric of every step must be bit-equal to those of the undisturbed job, but for those that depend on
time, and no process may be left on the nodes. Another job loses a rank on the same node twice: the requeue must leave
that node out. It is then cancelled in the middle of its start, and must leave no process either. Without --quick there
is a second layout, and a job that is ended by `touch RUN/stop`. --only runs one layout, or one of these two jobs, and
nothing else.

Last line, JSON: {"layouts": [{"name", "steps", "restarts", "bit_equal", "seconds"}], "left_out": "node2", "left": n}.
"left_out" is null where no job lost a node.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
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
LOST_NODE, STOP_FILE = "lost node", "stop file"
"""Jobs beside those of the layouts."""
DISK_MB = 64
MET = ("2 nodes see one directory, have one set of versions", "all-reduce")
TOLD = "a checkpoint could not be written: [Errno 28] No space left on device"
MINUTES, WARNING_S = 60, 180
"""A job's time limit, and how long before it Slurm sends the warning."""
START_S = 600
"""A start may take so long before its first step is done: four ranks share the machine's cores."""
STEP_S = 180
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

    def __init__(self, cluster: Cluster, run_dir: Path, overrides: list[str], doctor: str = "quick") -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        options = [f"--time={MINUTES}", f"--signal=B:USR1@{WARNING_S}", f"--export=ALL,TREEPO_DOCTOR={doctor}"]
        command = ["sbatch", "--parsable", f"--output={self.log}", *options, "slurm/treepo_cpu.sh"]
        overrides = [*BASE, f"train.num_rollouts={STEPS}", "checkpoint.save_interval=2", *overrides]
        self.id = cluster.slurm(*command, *overrides, f"logging.run_dir={run_dir}").strip()

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        # squeue prints nothing for a job that has ended, which a loop cannot tell from an error.
        shown = self.cluster.slurm("scontrol", "show", "job", "-o", self.id)
        found = re.search(rf"(?:^| ){name.strip()}=(\S*)", shown)
        if found is None:
            raise Failed(f"job {self.id} has no {name}: {shown}")
        return found.group(1)

    def steps(self) -> int:
        """Steps whose metrics are written."""
        rows = metrics(self.run_dir) if (self.run_dir / "metrics.jsonl").is_file() else []
        return max((row["step"] for row in rows), default=0)

    def hosts(self) -> list[str]:
        """Its nodes, the head first."""
        return self.cluster.slurm("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def ranks(self) -> dict[str, list[int]]:
        """Process ids of its ranks, by node."""
        return {host: [int(pid) for pid in self.cluster.call("ranks", host).split()] for host in self.hosts()}

    def has_ranks(self) -> bool:
        """Whether each of its nodes has some; a job that waits has no nodes."""
        ranks = self.ranks()
        return bool(ranks) and all(ranks.values())

    def said(self, text: str) -> bool:
        """Whether its output has `text`."""
        return self.log.is_file() and text in self.log.read_text(encoding="utf-8", errors="replace")

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
    say(f"step {job.steps()}: its time is nearly up")
    reach_time_limit(job)
    job.wait_for_restart(1)
    job.cluster.slurm("scontrol", "update", f"JobId={job.id}", f"TimeLimit={MINUTES}")
    job.wait_for_step(KILL_AFTER)
    dead = job.hosts()[-1]
    say(f"step {job.steps()}: SIGKILL to all of {dead}")
    job.cluster.call("kill", dead)
    job.wait("the failure to be noticed", DOWN_S + STEP_S, lambda: job.field("JobState") != "RUNNING")
    job.wait_for_restart(2)
    job.cluster.call("start", dead)
    job.wait_for_step(FULL_AFTER - 1)
    say(f"step {job.steps()}: the disk of the checkpoints is full")
    filler = disk / "filler"
    fill(filler)
    job.wait("the failure to be noticed", DOWN_S + START_S, lambda: job.field("JobState") != "RUNNING")
    filler.unlink()
    job.wait_for_end()
    if not job.said(TOLD):
        raise Failed(f"nothing in the job's log says {TOLD!r}\n{job.tail()}")


def reach_time_limit(job: Job) -> None:
    """Bring the limit so near that Slurm sends its warning at its next look, half a minute from now at the latest."""
    pids = [pid for ranks in job.ranks().values() for pid in ranks]
    # The run would be over by then. A rank that stands still computes nothing else afterwards.
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        hours, minutes, _ = job.field("RunTime").rsplit(":", 2)
        limit = 60 * int(hours) + int(minutes) + WARNING_S // 60
        job.cluster.slurm("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")
        job.wait("the warning", WARNING_S, lambda: job.said("asked to stop"))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


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
    calm = Job(cluster, directory / f"{label}-calm", overrides, doctor="1")
    calm.wait_for_end()
    for text in MET:
        if not calm.said(text):
            raise Failed(f"the doctor did not say {text!r}\n{calm.tail()}")
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


def lose_a_node_twice(cluster: Cluster, directory: Path) -> str:
    """A node that fails again is left out; `scancel` in the middle of the next start leaves no process behind."""
    say("a job that loses a rank on the same node, twice")
    job = Job(cluster, directory / "cancelled", LAYOUTS["TP2 x DP2"])
    bad = ""
    for attempt in range(2):
        job.wait("its ranks", START_S, job.has_ranks)
        bad = bad or job.hosts()[-1]
        for pid in job.ranks()[bad]:
            os.kill(pid, signal.SIGKILL)
        job.wait_for_restart(attempt + 1)
    if job.field("ExcNodeList") != bad or bad in job.hosts() or not job.said(f"the next start leaves out {bad}"):
        raise Failed(f"{bad} failed twice, and the next start has {job.hosts()}\n{job.tail()}")
    say(f"{bad} is left out; the job is cancelled while it starts")
    job.wait("its ranks", START_S, job.has_ranks)
    cluster.slurm("scancel", job.id)
    deadline = time.monotonic() + DOWN_S
    while (left := cluster.call("left")) or job.field("JobState") != "CANCELLED":
        if time.monotonic() > deadline:
            raise Failed(f"{DOWN_S} s after scancel the job is {job.field('JobState')}, and there are left:\n{left}")
        time.sleep(0.3)
    return bad


def stop_by_file(cluster: Cluster, directory: Path) -> None:
    """`touch RUN/stop` ends a job after its step, with a checkpoint and no requeue."""
    say("a job that a file asks to stop")
    job = Job(cluster, directory / "stopped", LAYOUTS["TP2 x DP2"])
    job.wait_for_step(1)
    stop = job.run_dir / "stop"
    stop.touch()
    job.wait_for_end()
    done = job.steps()
    saved = sorted(path.name for path in (job.run_dir / "checkpoints").iterdir())
    if done >= STEPS or stop.read_text() != f"saved after step {done}\n" or f"step_{done:06d}" not in saved:
        raise Failed(f"after {done} steps the stop file says {stop.read_text()!r}, there are {saved}\n{job.tail()}")
    if job.field("Restarts") != "0" or cluster.call("left"):
        raise Failed(f"{job.field('Restarts')} restarts, left running: {cluster.call('left')}\n{job.tail()}")


def say(text: str) -> None:
    """A line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    """Boot, run, compare, end; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="TP2 x DP2 alone, no stop by a file")
    parser.add_argument("--only", choices=[*LAYOUTS, LOST_NODE, STOP_FILE], help="this layout or job, and no other")
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
    names = ["TP2 x DP2", LOST_NODE] if arguments.quick else [*LAYOUTS, LOST_NODE, STOP_FILE]
    if arguments.only:
        names = [arguments.only]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "treepo-disk", str(disk)], check=True)
    try:
        # After the disk is there: hosts see the mounts of the time at which they were started.
        with Cluster(directory / "cluster", 3) as cluster:
            rows = [compare(name, LAYOUTS[name], cluster, disk, directory) for name in names if name in LAYOUTS]
            left_out = lose_a_node_twice(cluster, directory) if LOST_NODE in names else None
            if STOP_FILE in names:
                stop_by_file(cluster, directory)
    except Failed as failed:
        print(f"FAILED: {failed}", file=sys.stderr)
        return 1
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
    for row in rows:
        print(f"{row['name']}: {row['steps']} steps, {row['restarts']} restarts, bit-equal, {row['seconds']} s")
    print(json.dumps({"layouts": rows, "left_out": left_out, "left": 0}))
    if arguments.keep is None:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
