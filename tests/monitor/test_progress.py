"""The console: a bar in every phase on a terminal, one line a step elsewhere, nothing when it is off."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.timers import Timers


def played(*, terminal: bool, enabled: bool = True) -> str:
    """What a step of two phases shows."""
    progress = Progress(enabled=enabled)
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, soft_wrap=True)
    timers = Timers()
    timers.watchers.append(progress.phase)
    progress.begin(2, 40)
    with timers("step"):
        with timers("rollout"):
            progress.leaves(3, 8)
            progress.leaves(8, 8)
        with timers("update"):
            pass
    progress.show(3, {"reward/mean": 0.5, "perf/step_s": 1.25})
    progress.close()
    # Colours apart: the test is about words.
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", progress.console.file.getvalue())


def test_a_log_gets_one_line_a_step():
    assert played(terminal=False) == "   step 3/40  reward 0.500  s 1.2\n"


def test_a_terminal_shows_the_phase_and_takes_its_bar_away():
    shown = played(terminal=True)
    assert "step 3/40 rollout" in shown and "step 3/40 update" in shown
    assert shown.rstrip().endswith("step 3/40  reward 0.500  s 1.2"), "the line stays"


@pytest.mark.parametrize("terminal", [True, False])
def test_off_is_quiet(terminal):
    assert played(terminal=terminal, enabled=False) == ""
