"""SIGTERM and SIGUSR1 are remembered, not obeyed at once."""

from __future__ import annotations

import os
import signal

import pytest

from treepo_mega.runtime.signals import STOPPED_EXIT_CODE, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopRequest().install()
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.requested, "asking twice changes nothing"
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_the_exit_status_is_not_one_of_failure():
    assert STOPPED_EXIT_CODE == 75  # EX_TEMPFAIL; the job scripts requeue on it
