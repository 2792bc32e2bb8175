"""An engine's rank that dies or hangs in the middle of a rollout ends the run with a message that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ranks import finish, start_ranks

WORKER = Path(__file__).with_name("lost_rank_worker.py")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_lost_rank_is_named_and_nothing_hangs(tiny_llama, how):
    code, out = finish(start_ranks(2, WORKER, tiny_llama, how), 150)
    assert "rank 1 goes" in out, out[-4000:]
    assert code != 0
    told = re.search(r"MESSAGE after (\d+) s: (.*)", out)
    assert told, out[-4000:]
    assert "rank 0 waited for all ranks to finish generation (deadline 12 s); missing: rank 1." in told[2]
    assert int(told[1]) <= 40, "the deadline is 12 s of waiting behind the survivor's own rollout"
