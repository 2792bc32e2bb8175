"""What Slurm charged: `sacct` of the jobs that are named. Its absence is said; it never stops a report."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from treepo_mega.monitor.report.read import ReportError

FIELDS = ("JobID", "JobName", "State", "ElapsedRaw", "AllocNodes", "AllocTRES", "ConsumedEnergyRaw")
DEADLINE_S = 60
JOB = re.compile(r"\d+(_(\d+|\[[\d,\-%]+\]))?")


@dataclass(frozen=True)
class Job:
    """One start of a job, or of a task of a job array. `gpus` is None where the allocation names none."""

    job: str
    name: str
    state: str
    elapsed_s: float
    nodes: int
    gpus: int | None
    energy_kj: float | None

    @property
    def gpu_hours(self) -> float | None:
        """Allocated, used or not."""
        return None if self.gpus is None else self.gpus * self.elapsed_s / 3600


@dataclass(frozen=True)
class Charged:
    """Jobs. `problems`: what was asked for and could not be had. `notes`: what was not asked for."""

    jobs: list[Job] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "jobs": [asdict(job) | {"gpu_hours": job.gpu_hours} for job in self.jobs],
            "notes": [*self.problems, *self.notes],
        }


def charged(jobs: Sequence[str]) -> Charged:
    """Every start of `jobs`, requeued ones included. Raises ReportError for what is no job id."""
    for job in jobs:
        if not JOB.fullmatch(job):
            raise ReportError(f"--slurm-job {job}: expected a job id, such as 1234, or 1234_5 of a job array")
    command = shutil.which("sacct")
    if not jobs:
        where = "" if command else "; there is no sacct on this machine"
        return Charged(notes=[f"Slurm's accounts were not asked: --slurm-job ID names a job{where}"])
    if command is None:
        return Charged(problems=["there is no sacct on this machine, so what Slurm charged is not known"])
    # -X: allocations, not steps; --duplicates: a requeued job has an entry for each start.
    call = [command, "-X", "--duplicates", "--parsable2", "--noheader", f"--format={','.join(FIELDS)}"]
    try:
        done = subprocess.run([*call, "-j", ",".join(jobs)], capture_output=True, text=True, timeout=DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Charged(problems=[f"sacct could not be asked: {error}"])
    if done.returncode:
        return Charged(problems=[f"sacct failed with status {done.returncode}: {done.stderr.strip()[:300]}"])
    found = []
    notes = []
    for line in done.stdout.splitlines():
        try:
            found.append(parse(line))
        except ValueError as error:
            notes.append(f"a line of sacct was left out: {error}")
    if not found:
        notes.append(f"sacct knows no job {', '.join(jobs)}")
    return Charged(found, notes)


def parse(line: str) -> Job:
    """One line of `sacct --parsable2`, with FIELDS. Raises ValueError naming what does not fit.

    >>> parse("12|treepo|TIMEOUT|3600|2|billing=16,gres/gpu=16,node=2|").gpu_hours
    16.0
    """
    cells = line.split("|")
    if len(cells) != len(FIELDS):
        raise ValueError(f"expected {len(FIELDS)} fields, got {line[:120]!r}")
    job, name, state, elapsed, nodes, allocated, energy = cells
    gpus = re.search(r"(?:^|,)gres/gpu=(\d+)", allocated)
    return Job(
        job,
        name,
        state.split()[0] if state else "",
        float(elapsed or 0),
        int(nodes or 0),
        int(gpus[1]) if gpus else None,
        # Slurm writes 0 where no plug-in measures energy.
        float(energy) / 1000 if energy not in ("", "0") else None,
    )
