"""The figures of a run's report, JSON-safe: what it spent, how fast each phase was, what it learned.

Rates are those of the whole run: tokens (or FLOPs) of a phase by its GPU-seconds, not a mean of rates, which would
give a short step the weight of a long one. The token ratio is the sum of unique by the sum of flat tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from treepo_mega.monitor.phases import CAUSES, IDLE
from treepo_mega.monitor.report.hours import AGAIN, TRAINING, Spent, account, waterfall
from treepo_mega.monitor.report.machine import memory_by_phase, refit, slow_ranks
from treepo_mega.monitor.report.numbers import number, percentile, weighted
from treepo_mega.monitor.report.planned import Planned, against
from treepo_mega.monitor.report.read import Run
from treepo_mega.monitor.report.stragglers import Stragglers, find_stragglers
from treepo_mega.monitor.timers import WALL

Row = dict[str, Any]
TOKENS = {
    "generated": "rollout/generated_tokens",
    "cached": "rollout/cached_tokens",
    "recomputed": "rollout/recomputed_tokens",
    "forwarded": "rollout/forwarded_tokens",
    "dropped": "rollout/dropped_tokens",
    "wasted": "rollout/wasted_tokens",
    "unique": "tree/unique_tokens",
    "flat": "tree/flat_tokens",
    "packed": "perf/packed_tokens",
}
TRENDS = (
    "rollout/reward_policy",
    "rollout/accuracy_policy",
    "rollout/reward_mean",
    "rollout/accuracy",
    "reward/mean",
    "eval/accuracy",
    "eval/greedy_accuracy",
)
MEDIANS = (
    *("perf/tokens_per_s", "perf/step_s", "reshard/gb_per_s", "reshard/seconds", "reshard/bytes"),
    *("reshard/bytes_moved", "reshard/bytes_over_bound", "reshard/transport_s", "reshard/pack_s"),
    *("reshard/buffer_bytes", "reshard/handover_freed_bytes", "reshard/handover_taken_bytes"),
    *("rollout/engine_idle_share", "rollout/engine_idle_share_max"),
)
TOTALS = (
    *("reward/lost", "train/skipped_steps", "train/nonfinite_metrics", "tree/shortfall", "tree/fallbacks"),
    *("reshard/canary_failures", "train/head_fallback", "gpu/ecc_errors", "logging/sink_failures"),
)
PHASES = ("step", "rollout", *TRAINING)
RATES = ("unique_tokens_per_s_per_gpu", "flat_tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "hfu")
REWARDS = ("rollout/reward_policy", "rollout/reward_mean", "reward/mean")
ENDS = 0.1
"""Of the steps: the first and the last tenth are averaged for what a run gained."""
MEMORY = ("_gib", "_gib_mean", "_gib_max", "_bytes")


@dataclass(frozen=True)
class Seen:
    """A run with what was found out about it."""

    run: Run
    spent: Spent
    stragglers: Stragglers
    figures: Row


def summarise(
    run: Run, *, now: float, gpus: float | None = None, price: float | None = None, plan: Planned | None = None
) -> Seen:
    """All figures of a run. What it did not log is null. `price`: of a GPU-hour, in any currency."""
    spent = account(run, gpus)
    slow = find_stragglers(run.path)
    tokens = {name: run.total(metric) for name, metric in TOKENS.items()}
    trends = {}
    for metric in TRENDS:
        values = run.series(metric)[1]
        if len(values):
            ends = {"first": float(values[0]), "last": float(values[-1]), "best": float(values.max())}
            trends[metric] = ends | {"count": len(values)}
    medians = {key: percentile(found, 0.5) for key in MEDIANS if len(found := run.series(key)[1])}
    totals = {key: total for key in TOTALS if (total := run.total(key)) is not None}
    kept = run.steps[run.kept]
    rates = throughput(run, spent)
    figures = {
        "run": run.name,
        "status": run.status(now),
        "steps": len(kept),
        "first_step": int(kept[0]) if len(kept) else None,
        "last_step": int(kept[-1]) if len(kept) else None,
        "wall_s": spent.wall_s,
        "clock_s": spent.clock_s,
        "gpus": number(spent.gpus[-1]) if spent.known else None,
        "unit": spent.unit,
        "hours": spent.total_hours,
        "phases": phases(run, spent),
        "waterfall": _bars(run, spent, plan) if len(kept) else [],
        "throughput": rates,
        "plan": [] if plan is None or not len(kept) else against(run, rates, plan),
        "refit": refit(run, spent, plan),
        "links": None if plan is None or plan.refit is None else plan.refit.to_dict(),
        "memory_by_phase": memory_by_phase(run, plan) if len(kept) else [],
        "memory": memory(run),
        "ranks": slow_ranks(run),
        "tokens": tokens,
        "token_ratio": tokens["unique"] / tokens["flat"] if tokens["unique"] is not None and tokens["flat"] else None,
        "trends": trends,
        "medians": medians,
        "totals": totals | ({"restarts": float(spent.restarts)} if len(kept) else {}),
        "idle": {cause: share for cause in CAUSES if (share := _idle(run, spent, cause)) is not None},
        "cost": cost(run, spent, price),
        "stragglers": slow.to_dict(),
        "summary": run.summary,
        "notes": [*run.notes, *_doubts(run, spent), *(slow.notes if slow.found else []), *run.samples.notes],
    }
    return Seen(run, spent, slow, figures)


def _bars(run: Run, spent: Spent, plan: Planned | None) -> list[Row]:
    return [asdict(bar) for bar in waterfall(run, spent, None if plan is None else plan.bubble)]


def phases(run: Run, spent: Spent) -> list[Row]:
    """Pieces of the run, longest first: name, steps, p50, p95, seconds in all, share of the wall time, hours."""
    wall = spent.wall_s
    found = []
    for name, seconds in spent.seconds.items():
        times = seconds[seconds > 0]
        found.append(
            {
                "name": name,
                "steps": len(times),
                "p50": percentile(times, 0.5),
                "p95": percentile(times, 0.95),
                "total": float(seconds.sum()),
                "share": float(seconds.sum()) / wall if wall else 0.0,
                "hours": spent.hours(seconds),
            }
        )
    return sorted(found, key=lambda part: -part["total"])


def throughput(run: Run, spent: Spent) -> Row:
    """Rates by phase, of the whole run: see the module's page."""
    out: Row = {}
    for phase in PHASES:
        prefix = "perf/" if phase == "step" else f"perf/{phase}_"
        seconds = run.column(WALL + phase) * spent.devices[run.kept]
        rates = {rate: weighted(run.column(prefix + rate), seconds) for rate in RATES}
        if any(value is not None for value in rates.values()):
            out[phase] = rates
    return out


def memory(run: Run) -> list[Row]:
    """Every other figure of memory that was logged: its name, median and maximum over steps, in GiB."""
    out = []
    for name in sorted(run.columns):
        if name.endswith(MEMORY) and not name.startswith(("reshard/bytes", "rollout/", "memory/")):
            values = run.series(name)[1] / (2**30 if name.endswith("_bytes") else 1)
            if len(values):
                out.append({"name": name, "p50": percentile(values, 0.5), "max": float(values.max())})
    return out


def cost(run: Run, spent: Spent, price: float | None) -> Row:
    """Trajectories, energy and money, and what a GPU-hour gained; null where it is not known."""
    leaves = run.total("tree/leaves")
    energy = run.total("gpu/energy_kj")
    money = price * spent.total_hours if price is not None and spent.known else None
    gain = _gain(run)
    hours = spent.total_hours
    return {
        "trajectories": leaves,
        "energy_kwh": None if energy is None else energy / 3600,
        "energy_kwh_per_1000": energy / 3.6 / leaves if energy is not None and leaves else None,
        "hours_per_1000": 1000 * hours / leaves if leaves else None,
        "price_of_an_hour": price,
        "cost": money,
        "cost_per_1000": 1000 * money / leaves if money is not None and leaves else None,
        "reward_gain": gain,
        "reward_gain_per_hour": gain / hours if gain is not None and hours else None,
    }


def _gain(run: Run) -> float | None:
    """Mean reward of the last tenth of the steps less that of the first."""
    values = next((found for name in REWARDS if len(found := run.series(name)[1]) > 1), None)
    if values is None:
        return None
    count = max(1, round(ENDS * len(values)))
    return float(values[-count:].mean() - values[:count].mean())


def _idle(run: Run, spent: Spent, cause: str) -> float | None:
    """Share of the engines' room that was empty for `cause`, over all rollouts."""
    return weighted(run.column(IDLE + cause), run.column(WALL + "rollout") * spent.devices[run.kept])


def _doubts(run: Run, spent: Spent) -> list[str]:
    """What does not add up."""
    out = []
    if len(run.steps) and not spent.known:
        out.append(f"{run.name}: its metrics do not say how many GPUs it had (--gpus N): job-hours are of all together")
    if spent.clock_s > 0.02 * spent.wall_s:
        out.append(
            f"{run.name}: phases claim {spent.clock_s:.3g} s more than lies between the lines' time stamps: the clock "
            "was set back, or the file was written afterwards"
        )
    if AGAIN in spent.seconds:
        out.append(f"{run.name}: {spent.seconds[AGAIN].sum():.3g} s went into steps that were done again")
    return out
