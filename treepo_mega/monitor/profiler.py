"""torch's profiler over the training phases of some steps: operators and kernels, as Chrome traces.

    profiler = PhaseProfiler([3], folder, rank=1)
    profiler.begin_step(3)
    with profiler.phase("update"): ...      # writes folder/step_3/rank_1_update.json.gz

A phase has a file, so that each opens in chrome://tracing or ui.perfetto.dev. The rollout is left out: an engine's
thousands of small steps would make gigabytes, and `logging.trace_steps` shows it. A file is bounded by its phase, a run
by MAX_STEPS and MAX_PHASES. Times are those of a profiled run, which is slower.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PHASES = ("advantage", "old_logprobs", "ref_logprobs", "update", "reshard")
MAX_PHASES = 16
"""Profiles of a rank in a step: a phase may be entered several times."""

logger = logging.getLogger(__name__)


class PhaseProfiler:
    """See the module docstring. `steps`: counted from 1."""

    def __init__(self, steps: Sequence[int], folder: Path, rank: int) -> None:
        self._steps = frozenset(steps)
        self._folder = folder
        self._rank = rank
        self._step: int | None = None
        self._entered: Counter[str] = Counter()

    def begin_step(self, step: int) -> None:
        """What follows belongs to `step`."""
        self._step = step if step in self._steps else None
        self._entered.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Profile the body of a `with` statement, if it is a phase of a step that is wanted."""
        if self._step is None or name not in PHASES or self._entered.total() >= MAX_PHASES:
            yield
            return
        # Only here: its first use loads Kineto.
        from torch.profiler import ProfilerActivity, profile

        from treepo_mega.runtime.device import has_cuda

        self._entered[name] += 1
        entry = "" if self._entered[name] == 1 else f"_{self._entered[name]}"
        path = self._folder / f"step_{self._step}" / f"rank_{self._rank}_{name}{entry}.json.gz"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_cuda()
        with profile(activities=activities) as running:
            yield
        path.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(path))
        if self._rank == 0:
            logger.info("torch profile of %s: %s", name, path)
