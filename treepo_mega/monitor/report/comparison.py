"""Runs side by side with a baseline: ratios, and the saving at equal accuracy by ScaleRL's fit.

Runs whose configurations differ in the seed and in where they write alone are one arm: they are fitted together, and
intervals then come from drawing runs. Compute is the time of the steps, without evaluation and checkpoints; tokens
are compared only where the vocabularies are the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from treepo_mega.monitor.report.numbers import Array, number
from treepo_mega.monitor.report.read import Run
from treepo_mega.monitor.report.summary import REWARDS, Row, Seen
from treepo_mega.monitor.scaling_fit import Curve, Fit, Saving, fit, saving
from treepo_mega.monitor.timers import WALL

ACCURACIES = ("eval/accuracy", "rollout/accuracy_policy", "rollout/accuracy")
FEWEST_EVALUATIONS = 6
DRAWS = 200
"""Of the bootstrap."""
OF_ONE_RUN = (
    *(("train", "seed"), ("logging", "run_dir"), ("checkpoint", "save"), ("checkpoint", "load")),
    *(("logging", "sinks"), ("logging", "progress"), ("logging", "tensorboard")),
)
"""Keys that do not tell arms apart."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone. `fits`: by axis, `hours` and `tokens`."""

    name: str
    members: list[Seen]
    is_baseline: bool
    metric: str | None
    fits: dict[str, Fit] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All arms, baselines last; `savings`: by arm and axis, or why there is none. `places`: of runs, by name."""

    arms: list[Arm]
    savings: dict[tuple[str, str], Saving | str]
    notes: list[str]
    same_tokens: bool
    unit: str
    places: dict[str, int]


def compare(runs: Sequence[Seen], baselines: Sequence[Seen]) -> Comparison:
    """Fit every arm, and each arm against the first baseline."""
    everything = [*runs, *baselines]
    same_tokens, notes = vocabularies([seen.run for seen in everything])
    metric = _metric(everything)
    units = sorted({seen.spent.unit for seen in everything if len(seen.run.steps)})
    if len(units) > 1:
        notes.append(f"the runs' hours are of different kinds ({', '.join(units)}): their ratio says little")
    arms = [
        _fitted(arm, metric, same_tokens)
        for side, is_baseline in ((runs, False), (baselines, True))
        for arm in _arms(side, is_baseline)
    ]
    base = next((arm for arm in arms if arm.is_baseline), None)
    savings: dict[tuple[str, str], Saving | str] = {}
    for arm in arms:
        if base is not None and not arm.is_baseline:
            for axis, found in arm.fits.items():
                savings[arm.name, axis] = saving(found, base.fits[axis])
    places = {seen.run.name: place for place, seen in enumerate(everything)}
    return Comparison(arms, savings, notes, same_tokens, units[0] if len(units) == 1 else "hours", places)


def _metric(everything: Sequence[Seen]) -> str | None:
    """The first accuracy that all runs logged often enough; else the first that all logged."""
    counts = {
        name: [len(seen.run.series(name)[1]) for seen in everything if len(seen.run.steps)] for name in ACCURACIES
    }
    often = [name for name, found in counts.items() if found and min(found) >= FEWEST_EVALUATIONS]
    some = [name for name, found in counts.items() if found and min(found) > 0]
    return next(iter([*often, *some]), None)


def _arms(side: Sequence[Seen], is_baseline: bool) -> list[Arm]:
    groups: dict[str, list[Seen]] = {}
    for seen in side:
        # A run without a configuration may be anything: it is an arm of its own.
        groups.setdefault(_key(seen.run.config) if seen.run.config else seen.run.name, []).append(seen)
    out = []
    for members in groups.values():
        first = members[0].run.name
        name = first if len(members) == 1 else f"{first} and {len(members) - 1} more"
        out.append(Arm(name, members, is_baseline, None))
    return out


def _key(config: dict[str, Any]) -> str:
    """A configuration as text, without what belongs to one run."""
    stripped = copy.deepcopy(config)
    for section, name in OF_ONE_RUN:
        if isinstance(stripped.get(section), dict):
            stripped[section].pop(name, None)
    return json.dumps(stripped, sort_keys=True, default=str)


def _fitted(arm: Arm, metric: str | None, same_tokens: bool) -> Arm:
    if metric is None:
        return arm
    axes = ("hours", "tokens") if same_tokens else ("hours",)
    fits = {axis: fit([curve(seen, metric, axis) for seen in arm.members], draws=DRAWS) for axis in axes}
    return Arm(arm.name, arm.members, arm.is_baseline, metric, fits)


def curve(seen: Seen, metric: str, axis: str) -> Curve:
    """Compute spent up to a step, and the metric there. `hours`: of the steps; `tokens`: see `tokens_spent`."""
    run = seen.run
    if axis == "tokens":
        spent = np.cumsum(tokens_spent(run))
    else:
        spent = np.cumsum(np.nan_to_num(run.column(WALL + "step")) * seen.spent.devices[run.kept] / 3600)
    values = run.column(metric)
    known = np.isfinite(values)
    return spent[known], values[known]


def tokens_spent(run: Run) -> Array:
    """By kept line: tokens forwarded while sampling plus four passes' worth of packed ones (old, forward, backward)."""
    forwarded = np.nan_to_num(run.column("rollout/forwarded_tokens"))
    return np.asarray(forwarded + 4 * np.nan_to_num(run.column("perf/packed_tokens")))


def vocabularies(runs: Sequence[Run]) -> tuple[bool, list[str]]:
    """Whether tokens of these runs can be compared, and what to say of it."""
    found: dict[str, str | None] = {}
    for run in runs:
        model = run.config.get("model")
        where = model.get("hf_checkpoint") if isinstance(model, dict) else None
        found[run.name] = vocabulary(run, str(where) if where else None)
    known = {mark for mark in found.values() if mark is not None}
    if len(known) > 1:
        return False, ["the runs have different tokenizers: their tokens are not comparable, and are not compared"]
    unknown = [name for name, mark in found.items() if mark is None]
    if unknown and len(runs) > 1:
        names = ", ".join(unknown[:5])
        return True, [f"the tokenizer of {names} was not found: tokens are compared as if it were the same"]
    return True, []


def vocabulary(run: Run, checkpoint: str | None) -> str | None:
    """A hash of the vocabulary: of the model that was trained, else of the run's own export; None without either."""
    for folder in (Path(checkpoint) if checkpoint else None, run.path / "hf"):
        path = folder / "tokenizer.json" if folder else None
        if path is None or not path.exists():
            continue
        try:
            stored = json.loads(path.read_bytes())
            # Not the file: a tokenizer that was saved again has the same words in another order of keys.
            words = [stored["model"].get("vocab"), stored.get("added_tokens")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
    return None


def side_by_side(found: Comparison) -> list[tuple[str, list[tuple[float | None, float | None]]]]:
    """Rows of (figure, by arm: the mean over its runs, its ratio to the baseline's or None)."""

    def mean(arm: Arm, pick: Any) -> float | None:
        values = [value for seen in arm.members if (value := pick(seen.figures)) is not None]
        return float(np.mean(values)) if values else None

    def last(*names: str) -> Any:
        return lambda figures: next(
            (figures["trends"][name]["last"] for name in names if name in figures["trends"]), None
        )

    def rate(name: str) -> Any:
        return lambda figures: figures["throughput"].get("step", {}).get(name)

    metric = next((arm.metric for arm in found.arms if arm.metric), ACCURACIES[0])
    picks: list[tuple[str, Any, bool]] = [
        (found.unit, lambda figures: figures["hours"] or None, False),
        ("steps", lambda figures: figures["steps"], False),
        ("step p50, s", lambda figures: figures["medians"].get("perf/step_s"), False),
        ("tokens generated", lambda figures: figures["tokens"]["generated"], True),
        ("tokens forwarded in sampling", lambda figures: figures["tokens"]["forwarded"], True),
        ("tokens of a training pass", lambda figures: figures["tokens"]["packed"], True),
        ("unique / flat tokens", lambda figures: figures["token_ratio"], False),
        ("unique tokens/s per GPU", rate("unique_tokens_per_s_per_gpu"), True),
        ("flat tokens/s per GPU", rate("flat_tokens_per_s_per_gpu"), True),
        ("kWh per 1,000 trajectories", lambda figures: figures["cost"]["energy_kwh_per_1000"], False),
        (f"{metric}, last", last(metric), False),
        ("reward, last", last(*REWARDS), False),
    ]
    base = next((arm for arm in found.arms if arm.is_baseline), None)
    out = []
    for label, pick, is_of_tokens in picks:
        values = [mean(arm, pick) for arm in found.arms]
        if all(value is None for value in values):
            continue
        theirs = mean(base, pick) if base is not None else None
        comparable = found.same_tokens or not is_of_tokens
        ratios = [
            value / theirs if comparable and value is not None and theirs and arm is not base else None
            for arm, value in zip(found.arms, values, strict=True)
        ]
        out.append((label, list(zip(values, ratios, strict=True))))
    return out


def to_dict(found: Comparison) -> Row:
    """For report.json; a fit with a problem shows the problem and no parameters."""
    arms = []
    for arm in found.arms:
        fits = {axis: _fit_dict(one) for axis, one in arm.fits.items()}
        runs = [seen.run.name for seen in arm.members]
        arms.append({"name": arm.name, "baseline": arm.is_baseline, "runs": runs, "metric": arm.metric, "fits": fits})
    savings: list[Row] = []
    for (name, axis), one in found.savings.items():
        if isinstance(one, str):
            savings.append({"arm": name, "axis": axis, "problem": one})
        else:
            amounts = {"ours": one.ours, "baseline": one.baseline}
            interval = [number(end) for end in one.interval]
            about = {"arm": name, "axis": axis, "problem": None, "accuracy": one.accuracy}
            savings.append(about | {"ratio": one.ratio, "ci95": interval} | amounts)
    return {"arms": arms, "savings": savings, "same_tokens": found.same_tokens, "unit": found.unit}


def _fit_dict(one: Fit) -> Row:
    if one.problem is not None:
        return {"problem": one.problem, "points": one.points}
    names = ("start", "asymptote", "exponent", "midpoint")
    values = {name: getattr(one, name) for name in names}
    intervals = {name: list(ends) for name, ends in one.intervals.items()}
    return {"problem": None, "points": one.points, **values, "ci95": intervals}
