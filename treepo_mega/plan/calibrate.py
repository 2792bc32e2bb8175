"""Rates and lengths of a run that was measured, in place of the assumed ones. Pure.

    found = calibrate("runs/demo", cluster)
    found.rates, found.lengths, found.lines()

The run's own configuration is planned with the lengths that it had, and each rate is moved until its phase takes as
long as it did. The first step is left out where there are others: it compiles and warms up. What a run does not tell
(links, storage) keeps its assumed rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from treepo_mega.config import Config, load_config
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.rows import METRICS_FILE, read_metrics
from treepo_mega.plan.hardware import GIB, Rates
from treepo_mega.plan.layout import Held, Layout, held_bytes
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.memory import plan_memory
from treepo_mega.plan.refit import link_speeds, plan_refit
from treepo_mega.plan.seconds import phase_seconds, tree_shape
from treepo_mega.plan.timing import Cluster, training_work

Clock = Literal["timing_s", "cpu_s"]
"""timing_s: wall time. cpu_s: CPU time of the first rank's process, where a machine is shared."""


FEWEST_STEPS = 4
"""Steps from which a line is laid through their seconds."""
LEAST_SPREAD = 0.03
"""Deviation of the steps' tokens / their mean, below which no line is."""
MOST_FIXED = 0.9
"""Of a phase's seconds: noise could say that tokens cost nothing."""


class CalibrationError(TreepoError):
    """A run does not say what a plan needs; the message names the run and the metric."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of a run of `world` ranks: what it measured, as the plan takes it."""

    run: str
    world: int
    rates: Rates
    lengths: Lengths
    measured: dict[str, float]
    """Mean seconds of each phase."""
    resident_gib: float = 0.0
    """Most resident memory of the node's first rank and its graders; 0: not measured."""

    def lines(self) -> list[str]:
        """For people."""
        default = Rates()
        moved = [each.name for each in dataclasses.fields(Rates) if _differs(self.rates, default, each.name)]
        said = ", ".join(f"{name} {getattr(self.rates, name):.3g}" for name in moved)
        return [f"calibrated by {self.run} ({self.world} ranks): {said}"]


def _differs(one: Rates, other: Rates, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def calibrate(run: str | Path, cluster: Cluster, *, clock: Clock = "timing_s") -> Calibration:
    """What the run in the directory `run` measured on `cluster`. Raises CalibrationError, MetricsError, ConfigError."""
    directory = Path(run)
    for name, what in ((METRICS_FILE, "metrics"), ("config.yaml", "configuration")):
        if not (directory / name).is_file():
            raise CalibrationError(
                f"--calibrate {directory}: there is no {name}; expected a run's directory (logging.run_dir), which "
                f"holds its {what}"
            )
    rows = read_metrics(directory / METRICS_FILE)
    if not rows:
        raise CalibrationError(f"--calibrate {directory}: metrics.jsonl is empty; let the run finish a step")
    cfg = load_config(directory / "config.yaml", [])
    return calibrate_rows(str(directory), cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint), rows, cluster, clock=clock)


def calibrate_rows(
    run: str, cfg: Config, spec: ModelSpec, rows: Sequence[dict[str, Any]], cluster: Cluster, *, clock: Clock
) -> Calibration:
    """`calibrate` of the rows of a metrics.jsonl."""
    steps = list(rows[1:] or rows)

    def mean(metric: str) -> float:
        values = [row[metric] for row in steps if isinstance(row.get(metric), int | float)]
        if not values:
            raise CalibrationError(f"--calibrate {run}: no step has the metric {metric}, which the plan needs")
        return float(sum(values) / len(values))

    measured = {
        phase: mean(f"{clock}/{phase}")
        for phase in ("rollout", "reward", "old_logprobs", "ref_logprobs", "update", "reshard")
    }
    # The one metric that knows how many devices there were.
    world = max(1, round(mean("perf/packed_tokens") / mean("timing_s/step") / mean("perf/unique_tokens_per_s_per_gpu")))
    layout = Layout.of(cfg, world)
    lengths = _lengths(cfg, mean)
    held = held_bytes(cfg, spec, layout, layout.place(0))
    fixed = fixed_seconds(
        [(row["perf/packed_tokens"], row[f"{clock}/update"]) for row in steps if row.get(f"{clock}/update")]
    )
    rates = _rates(cfg, spec, layout, cluster, lengths, held, measured, fixed)
    resident = max((row.get("host/rss_gib_max") or 0.0 for row in steps), default=0.0)
    if cluster.gpu.is_cpu and resident > 0:
        peak = plan_memory(cfg, spec, layout, dataclasses.replace(cluster, rates=rates)).peak / GIB
        rates = rates.replace(runtime_gib=max(0.1, rates.runtime_gib + resident - peak))
    return Calibration(run, world, rates, lengths, measured, resident)


def fixed_seconds(points: Sequence[tuple[float, float]]) -> float:
    """Of (tokens, seconds) of steps: the seconds that do not grow with tokens, by least squares; 0 where none are seen.

    >>> fixed_seconds([(100, 3.0), (200, 5.0), (300, 7.0), (400, 9.0)])
    1.0
    """
    if len(points) < FEWEST_STEPS:
        return 0.0
    mean_tokens = sum(tokens for tokens, _ in points) / len(points)
    mean_seconds = sum(seconds for _, seconds in points) / len(points)
    spread = sum((tokens - mean_tokens) ** 2 for tokens, _ in points)
    if spread < len(points) * (LEAST_SPREAD * mean_tokens) ** 2:
        return 0.0
    slope = sum((tokens - mean_tokens) * (seconds - mean_seconds) for tokens, seconds in points) / spread
    return min(max(0.0, mean_seconds - slope * mean_tokens), MOST_FIXED * mean_seconds)


def _lengths(cfg: Config, mean: Any) -> Lengths:
    trees = mean("rollout/prompts_trained")
    dropped = mean("rollout/prompts_dropped_zero_std")
    leaves = mean("tree/leaves")
    found = Lengths(
        min(float(cfg.rollout.max_response_len), max(1.0, mean("rollout/response_len_mean"))),
        max(1.0, mean("tree/prompt_tokens") / max(1.0, trees)),
        _spread(mean),
        max(1e-3, trees / max(1.0, trees + dropped)),
        source="measured",
    )
    shape = tree_shape(cfg, found)
    made = trees * leaves / max(1.0, trees) / cfg.rollout.n_samples_per_prompt
    sampled = mean("rollout/generated_tokens") / max(1.0, shape.unique * made / found.kept)
    trained = mean("perf/packed_tokens") / max(1.0, training_work(cfg, shape).tokens)
    return dataclasses.replace(found, sampled=max(1e-3, sampled), trained=max(1e-3, trained))


def _spread(mean: Any) -> float:
    """Of a log-normal length, from the longest of the leaves: of n draws it lies about sqrt(2 ln n) deviations out."""

    longest = mean("rollout/response_len_max")
    average = max(1.0, mean("rollout/response_len_mean"))
    out = math.sqrt(2 * math.log(max(2.0, mean("tree/leaves"))))
    return min(1.5, max(0.05, math.log(max(1.0 + 1e-6, longest / average)) / out))


def _rates(
    cfg: Config,
    spec: ModelSpec,
    layout: Layout,
    cluster: Cluster,
    lengths: Lengths,
    held: Held,
    measured: dict[str, float],
    fixed: float,
) -> Rates:
    """Each rate such that its phase takes what was measured; phases that took nothing keep theirs."""
    nodes = min(layout.world, cluster.ranks_per_node)
    refit = plan_refit(cfg, spec, world_size=layout.world, ranks_per_node=nodes, speeds=link_speeds(cluster))
    links = sum(refit.seconds(link) for link in ("local", "node", "network"))
    budget = float(cfg.rollout.engine.kv_cache_memory_mb << 20) if cluster.gpu.is_cpu else 20e9

    def planned(rates: Rates) -> dict[str, float]:
        here = dataclasses.replace(cluster, rates=rates)
        return phase_seconds(cfg, spec, layout, here, lengths, held=held, kv_budget=budget, refit_s=links)

    passes = cfg.train.num_steps_per_rollout * cfg.train.ppo_epochs
    rates = cluster.rates.replace(pass_s=max(cluster.rates.pass_s, fixed / passes))
    if measured["update"] > 0:
        # Part of an update does not depend on these rates: a few rounds come as near as one wants.
        for _ in range(20):
            off = planned(rates)["update"] / measured["update"]
            names = ("train", "attention", "head")
            rates = rates.replace(**{name: getattr(rates, name) * off for name in names})
    for phase, rate in (("old_logprobs", "forward"), ("rollout", "rollout"), ("reshard", "refit")):
        took = planned(rates)[phase]
        if measured[phase] > 0 and took > 0:
            rates = rates.replace(**{rate: getattr(rates, rate) * measured[phase] / took})
    if measured["reward"] > 0:
        rates = rates.replace(reward_s=rates.reward_s * measured["reward"] / planned(rates)["reward"])
    return rates
