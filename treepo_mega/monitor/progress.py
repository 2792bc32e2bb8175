"""What a run shows on the console: a bar in every phase, one line a step. Rank 0; others print nothing.

Bars appear on terminals only; logs and pipes get the lines alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

COLUMNS = (
    ("rollout/accuracy_policy", "acc", ".3f"),
    ("reward/mean", "reward", ".3f"),
    ("rollout/response_len_policy", "len", ".1f"),
    ("tree/token_ratio", "token_ratio", ".3f"),
    ("train/loss", "loss", "+.4f"),
    ("grad-norm", "grad-norm", ".3f"),
    ("train/entropy", "entropy", ".3f"),
    ("rollout/logprob_abs_diff_max", "mismatch", ".1e"),
    ("eval/accuracy", "eval", ".3f"),
    ("eval/greedy_accuracy", "greedy", ".3f"),
    ("perf/step_s", "s", ".1f"),
)
LOG_WIDTH = 160
"""Characters of a table in a log or a pipe."""


def quieten_libraries() -> None:
    """Hide warnings of libraries about themselves: missing optional GPU packages, their own deprecated calls.

    Warnings of this project are not touched.
    """
    # They repeat on every rank and bury the run's own lines.
    for package in ("megatron", "torch", "vllm", "transformers"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{package}(\.|$)")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


class Progress:
    """Console output of a run; every method does nothing when not `enabled`."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        # Without soft_wrap rich breaks the line of a step at 80 columns in a log, where it finds no terminal.
        self.console = Console(highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        self._task = TaskID(0)
        self._label = ""

    def say(self, *lines: str) -> None:
        """Print lines."""
        if self.enabled:
            for line in lines:
                # Rich would take a `[name]` in the line for its markup and leave it out.
                self.console.print(line, markup=False)

    def show_table(self, table: Table) -> None:
        """Print a table: as wide as the terminal, or LOG_WIDTH where there is none."""
        if not self.enabled:
            return
        self.close()
        width = None if self.console.is_terminal else LOG_WIDTH
        # Into a string first: a console that knows no Unicode would end the run with an UnicodeEncodeError.
        with self.console.capture() as captured:
            self.console.print(table, soft_wrap=False, width=width)
        encoding = self.console.encoding
        self.console.out(captured.get().encode(encoding, "replace").decode(encoding), end="", highlight=False)

    def begin(self, step: int, of: int) -> None:
        """Name what comes."""
        self._label = f"step {step + 1}/{of}"

    def leaves(self, done: int, wanted: int) -> None:
        """Trajectories finished on this rank's engine."""
        if not self.enabled or not self.console.is_terminal:
            return
        bars = self._open()
        description = f"{self._label or 'evaluation'} sampling"
        bars.update(self._task, description=description, completed=done, total=wanted)
        if done >= wanted:
            self.close()

    def phase(self, name: str | None) -> None:
        """The phase that runs now, for `Timers.watchers`: a bar that moves while nobody knows how much is left."""
        if not self.enabled or not self.console.is_terminal:
            return
        if name in (None, "step"):
            self.close()
            return
        self._open().reset(self._task, description=f"{self._label} {name}".strip(), total=None)

    def _open(self) -> Bars:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, console=self.console, transient=True)
            self._bars.start()
            self._task = self._bars.add_task("", total=None)
        return self._bars

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line: the metrics people watch."""
        self.close()
        parts = [f"{label} {metrics[name]:{form}}" for name, label, form in COLUMNS if name in metrics]
        self.say(f"{self._label or 'start':>12}  " + "  ".join(parts))

    def close(self) -> None:
        """Take the bar away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
