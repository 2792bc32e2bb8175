"""Where each GPU-hour of a run went. Pure functions of a run's columns.

    spent = account(run)
    spent.seconds["update"]        # by line of metrics.jsonl
    spent.hours("update")          # seconds x GPUs / 3600
    waterfall(run, spent)          # from flat trajectories without a loss to what was measured

A run's wall time is that from its first line to its last, by the lines' own time stamps, plus the first line's own
seconds. Every second of it is in exactly one piece: a phase, `other in the step`, `between steps`, `restarts` (a gap
as long as a start takes: queue, start-up, work that was lost) or `steps done again`. Without a GPU a rank counts as
one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from treepo_mega.monitor.report.numbers import Array, short
from treepo_mega.monitor.report.read import Run
from treepo_mega.monitor.timers import WALL

OUTSIDE_STEP = ("eval", "checkpoint")
"""Phases that the loop runs after `timing_s/step` has ended."""
OTHER = "other in the step"
BETWEEN = "between steps"
RESTARTS = "restarts"
AGAIN = "steps done again"
SHORTEST_RESTART_S = 10.0
TRAINING = ("old_logprobs", "ref_logprobs", "update")


@dataclass(frozen=True)
class Spent:
    """`seconds`: by piece, an entry a line. `gpus`: by line; NaN where not known. `clock_s`: see `account`."""

    seconds: dict[str, Array]
    gpus: Array
    on_gpu: bool
    restarts: int
    clock_s: float

    @property
    def wall_s(self) -> float:
        """Of the whole run."""
        return float(sum(part.sum() for part in self.seconds.values()))

    @property
    def known(self) -> bool:
        """Whether the number of GPUs is."""
        return bool(len(self.gpus)) and bool(np.isfinite(self.gpus).all())

    @property
    def unit(self) -> str:
        """What an hour of one device is called here."""
        return ("GPU-hours" if self.on_gpu else "core-hours") if self.known else "job-hours"

    def hours(self, seconds: Array) -> float:
        """`seconds` by line, times the GPUs of each; of the whole job where their number is not known."""
        return float((seconds * self.devices).sum() / 3600)

    @property
    def devices(self) -> Array:
        """GPUs by line; 1 where their number is not known."""
        return self.gpus if self.known else np.ones(len(self.gpus))

    @property
    def total_hours(self) -> float:
        """Of the whole run."""
        return sum(self.hours(part) for part in self.seconds.values())


def account(run: Run, gpus: float | None = None) -> Spent:
    """Every second of the run. `gpus` overrides what the metrics say.

    `clock_s` is the time that phases claim beyond what lies between two time stamps: 0 but for a clock that was set
    back, or for a file that was written afterwards.
    """
    lines = len(run.steps)
    named = {
        name.removeprefix(WALL): np.nan_to_num(column)
        for name, column in run.columns.items()
        if name.startswith(WALL) and name != WALL + "step"
    }
    inside = sum((part for name, part in named.items() if name not in OUTSIDE_STEP), np.zeros(lines))
    outside = sum((part for name, part in named.items() if name in OUTSIDE_STEP), np.zeros(lines))
    step = np.maximum(np.nan_to_num(run.columns.get(WALL + "step", np.zeros(lines))), inside)
    accounted = step + outside
    gaps = np.zeros(lines)
    if lines > 1:
        gaps[1:] = np.nan_to_num(np.diff(run.times) - accounted[1:])
    clock_s = float(-gaps[gaps < 0].sum())
    gaps = np.maximum(gaps, 0.0)
    busy = accounted[accounted > 0]
    is_restart = gaps > max(SHORTEST_RESTART_S, 0.25 * float(np.median(busy)) if len(busy) else 0.0)
    pieces = {name: np.where(run.kept, part, 0.0) for name, part in named.items()}
    pieces[OTHER] = np.where(run.kept, step - inside, 0.0)
    pieces[BETWEEN] = np.where(is_restart, 0.0, gaps)
    pieces[RESTARTS] = np.where(is_restart, gaps, 0.0)
    pieces[AGAIN] = np.where(run.kept, 0.0, accounted)
    on_gpu = any(name.startswith("gpu/") or name.endswith("_mfu") for name in run.columns)
    counts = np.full(lines, gpus, np.float64) if gpus else gpu_counts(run)
    return Spent(
        {name: part for name, part in pieces.items() if part.any()}, counts, on_gpu, int(is_restart.sum()), clock_s
    )


def gpu_counts(run: Run) -> Array:
    """GPUs (ranks without one) by line: perf/packed_tokens / step time / perf/unique_tokens_per_s_per_gpu.

    A line that does not say has the number of the line before it, or of the next; all NaN where none says.
    """
    nothing = np.full(len(run.steps), np.nan)
    tokens, rate, step = (
        run.columns.get(name, nothing)
        for name in ("perf/packed_tokens", "perf/unique_tokens_per_s_per_gpu", "perf/step_s")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        found = tokens / (rate * step)
    known = np.isfinite(found) & (found > 0)
    if not known.any():
        return nothing
    places = np.where(known, np.arange(len(found)), -1)
    before = np.maximum.accumulate(places)
    before[before < 0] = int(np.argmax(known))
    return np.maximum(1.0, np.round(found[before]))


@dataclass(frozen=True)
class Bar:
    """Of a waterfall: a total, or what is added to the bar before it. `hours` in the unit of `Spent`."""

    name: str
    hours: float
    is_total: bool
    note: str = ""


def waterfall(run: Run, spent: Spent, bubble: float | None = None) -> list[Bar]:
    """From flat trajectories without any loss to the measured time. Bars add up exactly; see each bar's note.

    `bubble`: idle / busy time of the pipeline's stages, as a plan has it; None where nobody says.
    """

    def of(metric: str) -> Array:
        return np.where(run.kept, np.nan_to_num(run.columns.get(metric, np.zeros(len(run.steps)))), 0.0)

    def piece(name: str) -> Array:
        return spent.seconds.get(name, np.zeros(len(run.steps)))

    rollout = piece("rollout")
    idle = rollout * np.clip(of("rollout/engine_idle_share"), 0, 1)
    graders = np.minimum(rollout * np.clip(of("rollout/engine_grader_wait_share"), 0, 1), rollout - idle)
    unused = of("rollout/prompts_dropped_zero_std")
    # Surplus that later steps train on is no loss.
    if _key(run, "rollout", "surplus") != "carry":
        unused = unused + of("rollout/prompts_surplus")
    busy = rollout - idle - graders
    refills = busy * _share(unused, unused + of("rollout/prompts_trained"))
    again = (busy - refills) * _share(of("rollout/recomputed_tokens"), of("rollout/forwarded_tokens"))
    sampling = busy - refills - again
    training = sum((piece(name) for name in TRAINING), np.zeros(len(run.steps)))
    padding = training * np.clip(of("perf/padding_share"), 0, 1)
    recompute = piece("update") * (1 - np.clip(of("perf/padding_share"), 0, 1)) * of("perf/update_recompute_share")
    waits = (training - padding - recompute) * (bubble or 0.0) / (1 + (bubble or 0.0))
    learning = training - padding - recompute - waits
    refit = np.minimum(of("reshard/seconds"), piece("reshard"))
    saved_sampling = sampling * _saved(_share(of("tree/unique_tokens"), of("tree/flat_tokens")))
    saved_learning = learning * _saved(of("perf/packed_token_ratio"))
    useful = spent.hours(sampling + learning)
    wasted = of("rollout/wasted_tokens").sum()
    surplus = f"; {short(float(wasted))} tokens of dropped surplus (rollout/wasted_tokens)" if wasted else ""
    losses = [
        ("engines idle", idle, "rollout/engine_idle_share of the rollout"),
        ("refills", refills, f"the rollout's share of prompts that no update used; an estimate{surplus}"),
        ("prefixes prefilled again", again, "rollout/recomputed_tokens of the rollout; an estimate"),
        ("padding", padding, "perf/padding_share of the training passes"),
        ("pipeline bubble", waits, "the plan's bubble of the training passes; an estimate"),
        ("recomputed activations", recompute, "perf/update_recompute_share of the update"),
        ("grading", piece("reward") + graders, "the wait that sampling did not cover"),
        ("advantages", piece("advantage"), "credit and packs"),
        ("refit", refit, "reshard/seconds"),
        ("hand-over", piece("reshard") - refit, "memory from trainer to engine and back, and the canary"),
    ]
    shown = {"rollout", "reward", "advantage", "reshard", *TRAINING}
    losses += [(name, part, "") for name, part in spent.seconds.items() if name not in shown]
    bars = [
        Bar("flat, without losses", useful + spent.hours(saved_sampling + saved_learning), True, "an estimate"),
        Bar("trees: sampling", -spent.hours(saved_sampling), False, "tokens that siblings share; an estimate"),
        Bar("trees: training", -spent.hours(saved_learning), False, "tokens computed once; an estimate"),
        Bar("useful work", useful, True, _peak_note(run, spent, useful)),
        *(Bar(name, spent.hours(part), False, note) for name, part, note in losses if part.any()),
    ]
    stages = _key(run, "parallel", "pipeline_model_parallel_size")
    known = stages in (None, 1) or bubble is not None
    note = "" if known else f"the bubble of {stages} pipeline stages is in useful work: --plan says it"
    return [*bars, Bar("measured", spent.total_hours, True, note)]


def _key(run: Run, section: str, name: str) -> object:
    """A key of the run's configuration; None where it is not said."""
    found = run.config.get(section)
    return found.get(name) if isinstance(found, dict) else None


def _share(part: Array, whole: Array) -> Array:
    return np.clip(np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0), 0, 1)


def _saved(ratio: Array) -> Array:
    """Time that the same work takes longer without sharing, as a share of the time with it; 0 where not known."""
    return np.divide(1.0, ratio, out=np.ones_like(ratio), where=ratio > 0) - 1.0


def _peak_note(run: Run, spent: Spent, useful: float) -> str:
    """How much of it the devices would need at their peak, where MFU is known."""
    at_peak = 0.0
    for phase in ("rollout", *TRAINING):
        mfu = run.columns.get(f"perf/{phase}_mfu")
        if mfu is not None and phase in spent.seconds:
            at_peak += spent.hours(spent.seconds[phase] * np.nan_to_num(mfu))
    if not at_peak:
        return "no MFU: the device's peak is not known"
    return f"{at_peak:.3g} at the device's peak, {at_peak / useful:.1%} of it"
