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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from treepo_mega.config import Config, load_config
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.rows import METRICS_FILE, read_metrics
from treepo_mega.monitor.workload import kinds_of
from treepo_mega.plan.engine import Engine, RolloutLoad, rollout_load, waves
from treepo_mega.plan.hardware import GIB, Rates
from treepo_mega.plan.layout import Layout, held_bytes
from treepo_mega.plan.lengths import TREES, Lengths, read_lengths
from treepo_mega.plan.memory import plan_memory
from treepo_mega.plan.refit import link_speeds, plan_refit
from treepo_mega.plan.seconds import phase_seconds, tree_shape
from treepo_mega.plan.timing import Cluster, micro_batches, training_work

Mean = Callable[..., float]
"""(metric, default) -> its mean over steps; CalibrationError where it is missing and there is no default."""

Clock = Literal["timing_s", "cpu_s"]
"""timing_s: wall time. cpu_s: CPU time of the first rank's process, where a machine is shared."""


FEWEST_STEPS = 4
"""Steps from which a line is laid through their seconds."""
LEAST_SPREAD = 0.03
"""Deviation of the steps' tokens / their mean, below which no line is."""
MOST_FIXED = 0.9
"""Of a phase's seconds: noise could say that tokens cost nothing."""

USUAL = 0.9
"""Of the steps: their most resident memory counts, that of the others may be a moment's."""


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
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    # A run may have kept no trees: then its lengths are taken to be log-normal.
    tail = read_lengths(directory).tail if any((directory / TREES).glob("step_*.jsonl")) else ()
    return calibrate_rows(str(directory), cfg, spec, rows, cluster, clock=clock, tail=tail)


def calibrate_rows(
    run: str, cfg: Config, spec: ModelSpec, rows: Sequence[dict[str, Any]], cluster: Cluster, *, clock: Clock,
    tail: tuple[float, ...] = (),
) -> Calibration:  # fmt: skip
    """`calibrate` of the rows of a metrics.jsonl, and of the lengths of its trees."""
    steps = list(rows[1:] or rows)

    def mean(metric: str, otherwise: float | None = None) -> float:
        values = [row[metric] for row in steps if isinstance(row.get(metric), int | float)]
        if not values and otherwise is not None:
            return otherwise
        if not values:
            raise CalibrationError(f"--calibrate {run}: no step has the metric {metric}, which the plan needs")
        return float(sum(values) / len(values))

    measured = {
        phase: mean(f"{clock}/{phase}")
        for phase in ("rollout", "reward", "old_logprobs", "ref_logprobs", "update", "reshard")
    }
    # The one metric that knows how many devices there were.
    world = max(1, round(mean("perf/packed_tokens") / mean("timing_s/step") / mean("perf/unique_tokens_per_s_per_gpu")))
    at = _Measured(cfg, spec, Layout.of(cfg, world), cluster, measured)
    lengths = _lengths(at, mean, tail)
    rates = _engine_rates(at, lengths, mean, clock)
    rates = _training_rates(at.at(rates), lengths, steps, clock)
    resident = _usual_most([row["host/rss_gib_max"] for row in steps if row.get("host/rss_gib_max")])
    if cluster.gpu.is_cpu and resident > 0:
        peak = plan_memory(cfg, spec, at.layout, dataclasses.replace(cluster, rates=rates)).peak / GIB
        rates = rates.replace(runtime_gib=max(0.1, rates.runtime_gib + resident - peak))
    return Calibration(run, world, rates, lengths, measured, resident)


@dataclass(frozen=True, slots=True)
class _Measured:
    """A run, and the seconds of its phases."""

    cfg: Config
    spec: ModelSpec
    layout: Layout
    cluster: Cluster
    seconds: dict[str, float]

    def at(self, rates: Rates) -> _Measured:
        """The same with other rates."""
        return dataclasses.replace(self, cluster=dataclasses.replace(self.cluster, rates=rates))

    def planned(self, lengths: Lengths) -> dict[str, float]:
        """Seconds of the phases at the present rates."""
        cluster = self.cluster
        nodes = min(self.layout.world, cluster.ranks_per_node)
        refit = plan_refit(
            self.cfg, self.spec, world_size=self.layout.world, ranks_per_node=nodes, speeds=link_speeds(cluster)
        )
        links = sum(refit.seconds(link) for link in ("local", "node", "network"))
        held = held_bytes(self.cfg, self.spec, self.layout, self.layout.place(0))
        return phase_seconds(
            self.cfg, self.spec, self.layout, cluster, lengths, held=held, kv_budget=self.kv_budget, refit_s=links
        )

    def load(self, lengths: Lengths) -> RolloutLoad:
        """Of one of the run's engines."""
        shape = tree_shape(self.cfg, lengths)
        engine = Engine.of(self.cfg, self.spec, self.kv_budget, shape.prompt + shape.response / 2)
        return rollout_load(self.cfg, self.spec, self.layout, self.cluster, engine, shape, lengths)

    @property
    def kv_budget(self) -> float:
        """Bytes of an engine's cache."""
        return float(self.cfg.rollout.engine.kv_cache_memory_mb << 20) if self.cluster.gpu.is_cpu else 20e9


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


def _usual_most(values: Sequence[float]) -> float:
    """The value that USUAL of the values do not exceed; 0 of none.

    A checkpoint's writer is forked: for a moment its parent's pages are counted twice, though nobody holds them twice.
    """
    return sorted(values)[math.ceil(USUAL * (len(values) - 1))] if values else 0.0


def _lengths(at: _Measured, mean: Mean, tail: tuple[float, ...]) -> Lengths:
    """What the run sampled, and by which factors it differs from what its branching lets expect."""
    cfg = at.cfg
    trained = mean("rollout/prompts_trained")
    older = mean("rollout/surplus_trained", 0.0)
    fresh = max(1.0, trained - older)
    signal = fresh + mean("rollout/prompts_surplus", 0.0)
    seen = signal + mean("rollout/prompts_dropped_zero_std")
    found = Lengths(
        min(float(cfg.rollout.max_response_len), max(1.0, mean("rollout/response_len_mean"))),
        max(1.0, mean("tree/prompt_tokens") / seen),
        _spread(mean),
        max(1e-3, signal / seen),
        source="measured",
        tail=tail,
    )
    shape = tree_shape(cfg, found)
    sampled = mean("rollout/generated_tokens") / max(1.0, shape.unique * sum(waves(cfg, found.kept)))
    packed = mean("perf/packed_tokens") / max(1.0, training_work(cfg, shape).tokens)
    found = dataclasses.replace(found, sampled=max(1e-3, sampled), trained=max(1e-3, packed))
    load = at.load(found)
    engines = at.layout.world / at.layout.tp_v
    # A run of an earlier version does not say how many requests there were.
    requests = mean("rollout/requests", load.requests * engines)
    return dataclasses.replace(
        found,
        steps=max(1e-3, mean("rollout/engine_steps") / engines / max(1.0, load.steps)),
        requests=max(1e-3, requests / engines / max(1.0, load.requests)),
    )


def _spread(mean: Mean) -> float:
    """Of a log-normal length, from the longest of the leaves: of n draws it lies about sqrt(2 ln n) deviations out."""

    longest = mean("rollout/response_len_max")
    average = max(1.0, mean("rollout/response_len_mean"))
    out = math.sqrt(2 * math.log(max(2.0, mean("tree/leaves"))))
    return min(1.5, max(0.05, math.log(max(1.0 + 1e-6, longest / average)) / out))


def _engine_rates(at: _Measured, lengths: Lengths, mean: Mean, clock: Clock) -> Rates:
    """Costs of an engine's steps, tokens and requests; where a run does not tell them apart, one factor for all."""
    rates = at.cluster.rates
    took = at.seconds["rollout"]
    suffix = "cpu_s" if clock == "cpu_s" else "s"
    step, token, request = (mean(f"rollout/engine_{name}_{suffix}", 0.0) for name in ("step", "token", "request"))
    if step > 0 and token > 0:
        shape = tree_shape(at.cfg, lengths)
        engine = Engine.of(at.cfg, at.spec, at.kv_budget, shape.prompt + shape.response / 2)
        context = shape.prompt + shape.response / 2
        flops = (engine.matrices + context * engine.attention) / at.layout.tp_v
        peak = at.cluster.gpu.flops(kinds_of("rollout", at.cfg).layers)
        share = flops / (token * peak)
        rates = rates.replace(
            engine_step_s=step / at.spec.num_layers, decode_flops=share, prefill=share, request_s=max(1e-9, request)
        )
        # What is left was spent beside the engine: on grading, dealing and exchange.
        begun = sum(waves(at.cfg, lengths.kept)) / (at.layout.world / at.layout.tp_v)
        rest = took - at.at(rates).load(lengths).seconds
        rates = rates.replace(prompt_s=max(rates.prompt_s, rest / max(1.0, begun)))
    planned = at.at(rates).load(lengths).seconds
    return rates.replace(rollout=rates.rollout * took / planned) if took > 0 and planned > 0 else rates


def _training_rates(at: _Measured, lengths: Lengths, steps: Sequence[dict[str, Any]], clock: Clock) -> Rates:
    """Each rate such that its phase takes what was measured; phases that took nothing keep theirs."""
    rates = at.cluster.rates
    suffix = "cpu_s" if clock == "cpu_s" else "s"
    # The last one: the fit is of all steps so far.
    told = (steps[-1].get(f"perf/update_{name}_{suffix}") for name in ("step", "micro_batch", "token"))
    fixed = [float(value) for value in told if isinstance(value, int | float)]
    if len(fixed) == 3 and fixed[2] > 0:
        # Planned packs are full ones, of which there may be fewer than there were.
        passes = at.cfg.train.ppo_epochs * at.cfg.train.num_steps_per_rollout
        work = lengths.trained * training_work(at.cfg, tree_shape(at.cfg, lengths))
        planned = passes * micro_batches(at.cfg, at.layout, work)
        more = steps[-1]["perf/micro_batches"] / planned
        layers = at.spec.num_layers / at.layout.pp
        rates = rates.replace(
            pass_s=max(rates.pass_s, fixed[0]), micro_batch_s=max(rates.micro_batch_s, fixed[1] * more / layers)
        )
    else:
        points = [(row["perf/packed_tokens"], row[f"{clock}/update"]) for row in steps if row.get(f"{clock}/update")]
        optimizer_steps = at.cfg.train.num_steps_per_rollout * at.cfg.train.ppo_epochs
        rates = rates.replace(pass_s=max(rates.pass_s, fixed_seconds(points) / optimizer_steps))
    if at.seconds["update"] > 0:
        # Part of an update does not depend on these rates: a few rounds come as near as one wants.
        for _ in range(20):
            off = at.at(rates).planned(lengths)["update"] / at.seconds["update"]
            rates = rates.replace(**{name: getattr(rates, name) * off for name in ("train", "attention", "head")})
    for phase, rate in (("old_logprobs", "forward"), ("reshard", "refit"), ("reward", "reward_s")):
        took = at.at(rates).planned(lengths)[phase]
        if at.seconds[phase] > 0 and took > 0:
            rates = rates.replace(**{rate: getattr(rates, rate) * at.seconds[phase] / took})
    return rates
