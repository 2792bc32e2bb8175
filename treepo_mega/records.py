"""What a run leaves to read: configuration, metrics by step, a summary, and sampled trees.

    records = Records(cfg, progress, resume_step=None)
    records.log(step, metrics)

All of it lies under logging.run_dir and is written by rank 0, but for traces and profiles, which every rank writes; on
other ranks the methods only keep the summary.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from treepo_mega.config import Config, dump_config
from treepo_mega.loss.mismatch import LIMITS, share_names
from treepo_mega.monitor import completions, samples
from treepo_mega.monitor.metrics import MetricsLogger
from treepo_mega.monitor.phases import phase_table
from treepo_mega.monitor.profiler import PhaseProfiler
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.sinks import BUILT_IN, Run, Sinks, flat, open_sink
from treepo_mega.monitor.trace import Trace
from treepo_mega.monitor.tree_page.read import trees_path
from treepo_mega.plugins import open_sinks
from treepo_mega.plugins.record import record_plugins
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import atomic_file
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.node import Tree

SUMMARY = "summary.json"
IDENTITY = "run_id"
"""File with the name under which trackers know the run before and after a resume."""
SAMPLES = 4
"""Leaves whose text TensorBoard shows, of a step whose trees are saved."""
FARTHEST = 10.0
"""End of the last range of log ratios in TensorBoard's histogram, nats."""


class Records:
    """The files of a run. `resume_step`: the last step whose records are kept; 0 begins new ones."""

    def __init__(self, cfg: Config, progress: Progress, *, started: float, resume_step: int) -> None:
        self.progress = progress
        self.started = started
        self.run_dir = Path(cfg.logging.run_dir)
        self.trees_interval = cfg.logging.trees_interval
        self.trees_prompts = cfg.logging.trees_prompts
        self.completions = cfg.logging.completions
        # Told by every rank alike, though rank 0 alone shows and draws.
        self.draws = cfg.logging.tensorboard or "tensorboard" in cfg.logging.sinks
        self.shows = cfg.logging.progress and bool(self.completions)
        self.trace_steps = cfg.logging.trace_steps
        self.price_per_gpu_hour = cfg.logging.price_per_gpu_hour
        self.hours_before = 0.0
        self.trace: Trace | None = None
        self.profiler = PhaseProfiler(cfg.logging.torch_profiler_steps, self.run_dir / "profile", dist.rank())
        self.phases_interval = cfg.logging.phases_interval
        # A new run in an old directory must not add to the sums that another run left there.
        self.summary: dict[str, Any] = self._read_summary() if resume_step else {}
        self.logger: MetricsLogger | None = None
        self.sinks: Sinks | None = None
        if dist.is_main():
            self.run_dir.mkdir(parents=True, exist_ok=True)
            dump_config(cfg, self.run_dir / "config.yaml")
            self.sinks = self._open_sinks(cfg, resumed=bool(resume_step))
            # `or None`: a new run sets an older file aside, where step 0 would mean to go on with it.
            self.logger = MetricsLogger(
                self.run_dir,
                tensorboard=cfg.logging.tensorboard or "tensorboard" in cfg.logging.sinks,
                resume_step=resume_step or None,
                sinks=[self.sinks],
                config=flat(cfg.model_dump(exclude_defaults=True)),
            )
            self.hours_before = float(self.logger.last.get("perf/gpu_hours", 0.0))
            progress.say(*record_plugins(cfg, self.run_dir, resumed=bool(resume_step)))

    def _open_sinks(self, cfg: Config, *, resumed: bool) -> Sinks:
        """The sinks of `logging.sinks`, built in and of people's own. Raises SinkError."""
        logging = cfg.logging
        known = self.run_dir / IDENTITY
        if not (resumed and known.is_file()):
            with atomic_file(known) as file:
                file.write(secrets.token_hex(6) + "\n")
        run = Run(
            directory=self.run_dir,
            project=logging.project,
            name=logging.run_name or self.run_dir.resolve().name,
            identity=known.read_text(encoding="utf-8").strip(),
            resumed=resumed,
            offline=logging.sinks_offline,
            config=flat(cfg.model_dump()),
            address=logging.prometheus_address,
            port=logging.prometheus_port,
        )
        built_in = [(name, open_sink(name, run)) for name in dict.fromkeys(logging.sinks) if name in BUILT_IN]
        own = [name for name in logging.sinks if is_function_path(name)]
        for _, sink in built_in:
            if port := getattr(sink, "port", 0):
                self.progress.say(f"metrics for Prometheus: http://{logging.prometheus_address}:{port}/metrics")
        functions = list(zip(own, open_sinks(own), strict=True))
        return Sinks(built_in, functions, strict=logging.sinks_strict, say=self._warn)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The line of metrics after `step` finished steps; `summary.json` keeps what a reader asks first."""
        self._summarize(step, metrics)
        if self.logger is None:
            return
        metrics = metrics | self._spent()
        if self.sinks is not None and (failures := self.sinks.take_failures()):
            metrics = metrics | {"logging/sink_failures": float(failures)}
        self.logger.log(step, metrics)
        self._draw_ratios(step, metrics)
        self.progress.show(step, metrics)
        if self.phases_interval and step % self.phases_interval == 0:
            self._show_phases(step, metrics)
        with atomic_file(self.run_dir / SUMMARY) as file:
            file.write(json.dumps(self.summary, indent=1) + "\n")

    def _show_phases(self, step: int, metrics: dict[str, float]) -> None:
        found = phase_table(metrics, f"step {step}: where the time went (rank 0)")
        if found is not None:
            self.progress.show_table(found)

    def add_to_log(self, step: int, metrics: dict[str, float]) -> None:
        """More metrics for the line of `step`."""
        if self.logger is not None:
            self.logger.log(step, metrics)

    def trees_to_write(self, step: int, trees: Sequence[Tree]) -> list[Tree]:
        """Those of `trees` that rank 0 writes or shows after `step` and needs whole; every rank can tell."""
        saved = list(trees[: self.trees_prompts]) if self._saves_trees(step) else []
        shown = completions.choose(trees, self.completions) if self.shows else []
        if self.draws and self._saves_trees(step):
            shown += completions.choose(trees, SAMPLES)
        by_prompt = {tree.prompt_id: tree for tree in [*saved, *(tree for tree, _ in shown)]}
        return list(by_prompt.values())

    def _saves_trees(self, step: int) -> bool:
        return bool(self.trees_interval) and (step == 1 or step % self.trees_interval == 0)

    def save_trees(self, step: int, trees: Sequence[Tree]) -> None:
        """After step 1 and every logging.trees_interval steps, trees of logging.trees_prompts prompts, one a line."""
        if not self._saves_trees(step) or not dist.is_main():
            return
        with atomic_file(trees_path(self.run_dir, step)) as file:
            file.writelines(json.dumps(tree.to_dict()) + "\n" for tree in trees[: self.trees_prompts])

    def _warn(self, line: str) -> None:
        """A line for people, also where logging.progress hides the others."""
        if self.progress.enabled:
            self.progress.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def _spent(self) -> dict[str, float]:
        """GPU-hours and cost since the run began."""
        hours = self.hours_before + dist.world_size() * (time.time() - self.started) / 3600
        price = self.price_per_gpu_hour
        return {"perf/gpu_hours": hours} | ({} if price is None else {"perf/cost": hours * price})

    def _draw_ratios(self, step: int, metrics: dict[str, float]) -> None:
        board = None if self.logger is None else self.logger.board
        if board is not None and (names := share_names())[0] in metrics:
            board.shares(step, "histograms/log_ratio", [*LIMITS, FARTHEST], [metrics[name] for name in names])

    def draw(self, step: int, trees: Sequence[Tree], decode: Callable[[list[int]], str]) -> None:
        """For TensorBoard: advantages, rewards and lengths of all leaves; the text of a few where trees are saved."""
        board = None if self.logger is None else self.logger.board
        if board is None:
            return
        board.histograms(step, samples.distributions(trees))
        if self._saves_trees(step):
            for number, text in enumerate(samples.texts(trees, SAMPLES, decode), 1):
                board.text(step, f"samples/{number}", text)

    def show_completions(self, step: int, trees: Sequence[Tree], decode: Callable[[list[int]], str]) -> None:
        """logging.completions leaves of the step as a table on the console; nothing for 0."""
        if not self.completions or not self.progress.enabled:
            return
        found = completions.table(trees, self.completions, decode, title=f"step {step}: what the model wrote")
        if found is not None:
            self.progress.show_table(found)

    def timeline(self, step: int) -> Trace | None:
        """The trace on which `step`, counted from 1, is drawn; None outside logging.trace_steps.

        Asked at the beginning of every step: the one after the last writes the file.
        """
        if self.trace_steps is None:
            return None
        first, last = self.trace_steps
        if first <= step <= last:
            self.trace = self.trace or Trace(dist.rank())
        else:
            self._write_trace()
        return self.trace

    def _write_trace(self) -> None:
        if self.trace is not None:
            self.trace.write(self.run_dir / "trace" / f"rank_{dist.rank()}.json")
            self.trace = None

    def close(self) -> None:
        """Write what is left of the trace, and close the logs."""
        self._write_trace()
        if self.logger is not None:
            self.logger.close()
        if self.sinks is not None:
            self.sinks.close()

    def _summarize(self, step: int, metrics: dict[str, float]) -> None:
        summary = self.summary
        for name, key in (("eval/accuracy", "accuracy"), ("eval/greedy_accuracy", "greedy")):
            if name in metrics:
                # The first evaluation stays, also after a resume: later ones must not move the starting point.
                summary.setdefault(f"{key}_before", metrics[name])
                summary[f"{key}_after"] = metrics[name]
        if "tree/token_ratio" in metrics:
            summary["steps"] = step
            for name in ("unique_tokens", "flat_tokens"):
                summary[name] = summary.get(name, 0.0) + metrics[f"tree/{name}"]
            summary["token_ratio"] = summary["unique_tokens"] / max(1.0, summary["flat_tokens"])
            mismatch = metrics.get("rollout/logprob_abs_diff_max", 0.0)
            summary["mismatch_max"] = max(summary.get("mismatch_max", 0.0), mismatch)
        summary["seconds_train"] = round(time.time() - self.started, 1)

    def _read_summary(self) -> dict[str, Any]:
        path = self.run_dir / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
