"""Who was waited for: ranks by name, from the timelines that `logging.trace_steps` writes.

Phases end in collectives, so that a slow rank shows in its own phases hardly, but in the others' waiting. The rank that
waited least in a round is the one that the others waited for.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from treepo_mega.monitor.report.numbers import percentile

FOLDER = "trace"
WAITING = "waiting for other engines"
SAMPLING = "sampling"
RANKS_SHOWN = 8


@dataclass(frozen=True)
class Rank:
    """Seconds of a rank over all traced rounds, and the rounds in which it was the last."""

    rank: int
    sampling_s: float
    waiting_s: float
    last: int


@dataclass(frozen=True)
class Stragglers:
    """`ranks`: those waited for most, first. `phases`: name -> (p50, p95, max over ranks of the seconds in all)."""

    ranks: list[Rank] = field(default_factory=list)
    phases: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    world: int = 0
    rounds: int = 0
    notes: list[str] = field(default_factory=list)
    found: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        ranks = [vars(rank) for rank in self.ranks]
        return {"world": self.world, "rounds": self.rounds, "ranks": ranks, "phases": self.phases}


def find_stragglers(run_dir: Path) -> Stragglers:
    """Of the traces of all ranks; a note says what is missing."""
    paths = [(int(found[1]), path) for path in (run_dir / FOLDER).glob("rank_*.json") if (found := _number(path))]
    notes: list[str] = []
    if not paths:
        notes.append("no timeline by rank: logging.trace_steps writes one, and then ranks are named here")
        return Stragglers(notes=notes, found=False)
    spans = {}
    for rank, path in sorted(paths):
        try:
            spans[rank] = _spans(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{path}: cannot be read: {type(error).__name__}: {error}")
    if not spans:
        return Stragglers(notes=notes)
    names = sorted({name for of_rank in spans.values() for name in of_rank})
    phases = {}
    for name in names:
        totals = [float(of_rank[name].sum()) for of_rank in spans.values() if name in of_rank]
        phases[name] = (percentile(totals, 0.5), percentile(totals, 0.95), max(totals))
    waits = {rank: of_rank[WAITING] for rank, of_rank in spans.items() if WAITING in of_rank}
    rounds = min(map(len, waits.values())) if len(waits) > 1 else 0
    last = np.zeros(max(spans) + 1, np.int64)
    if rounds:
        waiting = np.stack([waits[rank][:rounds] for rank in waits])
        order = np.array(list(waits))
        last += np.bincount(order[waiting.argmin(axis=0)], minlength=len(last))
    ranks = [
        Rank(rank, _sum(of_rank, SAMPLING), _sum(of_rank, WAITING), int(last[rank])) for rank, of_rank in spans.items()
    ]
    ranks.sort(key=lambda one: (-one.last, one.waiting_s, one.rank))
    return Stragglers(ranks, phases, len(spans), rounds, notes)


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"rank_(\d{1,6})\.json", path.name)


def _sum(of_rank: dict[str, np.ndarray], name: str) -> float:
    return float(of_rank[name].sum()) if name in of_rank else 0.0


def _spans(path: Path) -> dict[str, np.ndarray]:
    """Seconds of each span, by name, in the order in which they ended."""
    found: dict[str, list[float]] = {}
    for event in json.loads(path.read_bytes())["traceEvents"]:
        if event.get("ph") == "X":
            found.setdefault(str(event["name"]), []).append(float(event["dur"]) / 1e6)
    return {name: np.array(values) for name, values in found.items()}
