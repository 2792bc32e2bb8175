"""What a run's files say about it now: whether it lives, what its ranks do, its newest metrics and its faults.

    seen = look(Path("runs/demo"), now=time.time())
    seen.verdict        # "running", "finished", "dead", ... in words for people

Only files are read, so that a run on another machine can be watched, and one that has died explained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.monitor.metrics import METRICS_FILE
from treepo_mega.monitor.status import BEAT, FOLDER

TAIL_BYTES = 1 << 20
"""Of metrics.jsonl: about a hundred steps."""

STANDS_S = 120.0
"""A rank stands still when it has shown no progress for so long and waits for nobody."""
LEAST_SILENCE_S = 30.0
"""A rank is silent after three signs of life that did not come, and not before this."""

FAULTS: tuple[tuple[str, float, str], ...] = (
    ("reward/lost", 0, "gradings lost to a timeout or crash"),
    ("train/skipped_steps", 0, "optimizer steps skipped for a non-finite gradient"),
    ("train/nonfinite_metrics", 0, "metrics that were not finite"),
    ("tree/shortfall", 0, "leaves missing from trees that ran dry"),
    ("reshard/canary_failures", 0, "times that engine and trainer did not agree after a refit"),
    ("train/head_fallback", 0, "steps with a bf16 head in place of the FP8 one"),
    ("rollout/leaves_rejected", 0, "trajectories rejected for the distance of engine and trainer"),
    ("gpu/ecc_errors", 0, "memory errors that ECC could not correct"),
    ("gpu/throttled_share_max", 0, "sum of the shares of time in which a card was slowed down"),
    ("logging/sink_failures", 0, "failed calls of sinks"),
)
"""Metric, the most that is healthy in a step, and what its sum over steps counts."""


class TopError(TreepoError):
    """There is no run to look at; the message names the directory."""


@dataclass(slots=True)
class Rank:
    """What a rank's own file says."""

    number: int
    host: str
    phase: str
    since: float
    time: float
    state: str
    silent: bool
    progress: float
    """Unix time of its last sign of progress."""
    waits_for: str


@dataclass(slots=True)
class Seen:
    """A run at one moment. `rows`: lines of metrics, oldest first."""

    name: str
    verdict: str
    alive: bool
    step: int = 0
    of: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(run_dir: Path, now: float) -> Seen:
    """The run in `run_dir` at Unix time `now`. Raises TopError when there is no such directory."""
    if not run_dir.is_dir():
        beside = [path.name for path in run_dir.parent.glob("*") if path.is_dir()] if run_dir.parent.is_dir() else []
        raise TopError(f"{run_dir}: no such run directory{nearest(run_dir.name, beside)}")
    notes: list[str] = []
    rows = _tail(run_dir / METRICS_FILE, notes)
    ranks, world, of, step = _ranks(run_dir / FOLDER, now, notes)
    of = of or _planned(run_dir)
    done = int(rows[-1]["step"]) if rows else 0
    verdict, alive = _verdict(rows, ranks, world, done, of, now)
    silent = [rank for rank in ranks if rank.silent]
    faults = [
        f"rank {rank.number} on {rank.host} gives no sign of life since {ago(now - rank.time)}, in {rank.phase}"
        for rank in silent[:5]
        if len(silent) < len(ranks)
    ]
    standing = [rank for rank in ranks if rank.state == "running" and not rank.silent and not rank.waits_for]
    faults += [
        f"rank {rank.number} on {rank.host} stands still for {ago(now - rank.progress)}, in {rank.phase or 'no phase'}"
        for rank in sorted(standing, key=lambda rank: rank.progress)[:5]
        if now - rank.progress > STANDS_S
    ]
    if ranks and len(ranks) < world:
        missing = sorted(set(range(world)) - {rank.number for rank in ranks})
        faults.append(f"{len(missing)} of {world} ranks have no status file here, such as rank {missing[0]}")
    return Seen(run_dir.resolve().name, verdict, alive, step or done, of, rows, ranks, faults + _faults(rows), notes)


def _verdict(
    rows: list[dict[str, Any]], ranks: list[Rank], world: int, done: int, of: int, now: float
) -> tuple[str, bool]:
    """(words, whether it is running)."""
    failed = next((rank for rank in ranks if rank.state.startswith("failed")), None)
    if failed is not None:
        return f"dead: rank {failed.number} on {failed.host} {failed.state}, {ago(now - failed.time)} ago", False
    ended = [rank for rank in ranks if rank.state != "running"]
    if ranks and len(ended) == len(ranks):
        return f"{ended[0].state} {ago(now - max(rank.time for rank in ended))} ago", False
    if ranks and all(rank.silent for rank in ranks if rank.state == "running"):
        newest = max(ranks, key=lambda rank: rank.time)
        return (
            f"dead: no sign of life since {ago(now - newest.time)}; rank {newest.number} on {newest.host} was in "
            f"{newest.phase or 'no phase'}. The end of its log says why",
            False,
        )
    if ranks:
        return "running", True
    if not rows:
        return "empty: neither metrics nor signs of life have been written here yet", False
    when = f"its last line is {ago(now - float(rows[-1].get('time', now)))} old"
    if of and done >= of:
        return f"finished: all {of} steps are there; {when}", False
    return f"not known: {when}, and it has no status files (logging.status_interval_s)", False


def ago(seconds: float) -> str:
    """A time span in words.

    >>> ago(5), ago(200), ago(7300), ago(200_000)
    ('5 s', '3 min', '2 h 1 min', '2 d 7 h')
    """
    seconds = max(0, int(seconds))
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _tail(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The last lines; those that cannot be read are told in `notes`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path}: cannot be read: {error.strerror}")
        return []
    lines = data.split(b"\n")
    if size > TAIL_BYTES:
        # It begins anywhere in a line.
        lines = lines[1:]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            # Without its newline it is being written, or the run was killed while it wrote it.
            what = "the last line is torn" if number == len(lines) else "a line is not valid JSON"
            notes.append(f"{path.name}: {what} and was left out")
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _ranks(folder: Path, now: float, notes: list[str]) -> tuple[list[Rank], int, int, int]:
    """(ranks in order, how many there are, steps of the run, the step that runs)."""
    told: dict[int, dict[str, Any]] = {}
    for path in folder.glob("rank_*.json"):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
            told[int(one["rank"])] = one
        except (OSError, ValueError, KeyError, TypeError):
            notes.append(f"{path.name}: cannot be read and was left out")
    if not told:
        return [], 0, 0, 0
    newest = max(told.values(), key=lambda one: one["time"])
    world = int(newest["world"])
    ranks = []
    for number, one in sorted(told.items()):
        # A run with more ranks was here before.
        if number < world:
            patience = max(LEAST_SILENCE_S, 3 * BEAT * float(one["interval_s"]))
            silent = one["state"] == "running" and now - one["time"] > patience
            # Files of earlier versions do not say it.
            progress, waits_for = float(one.get("progress", one["time"])), str(one.get("waits_for", ""))
            ranks.append(
                Rank(
                    number,
                    one["host"],
                    one["phase"],
                    one["since"],
                    one["time"],
                    one["state"],
                    silent,
                    progress,
                    waits_for,
                )
            )
    return ranks, world, int(newest["of"]), int(newest["step"])


def _planned(run_dir: Path) -> int:
    """`train.num_rollouts` of the run's configuration; 0 where that is not known."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return int(config["train"]["num_rollouts"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def _faults(rows: list[dict[str, Any]]) -> list[str]:
    """What went wrong in the lines, newest last seen."""
    out = []
    for name, healthy, what in FAULTS:
        steps = [row for row in rows if (row.get(name) or 0) > healthy]
        if steps:
            total = sum(row[name] for row in steps)
            out.append(f"{name}: {total:g} {what}, last at step {steps[-1]['step']}")
    return out
