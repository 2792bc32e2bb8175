"""Ranks that fetch the tokens they train plan, train and write what ranks do that were told everything."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import run_ranks


def test_plans_and_written_trees_are_those_of_ranks_that_hold_all():
    out = run_ranks(2, Path(__file__).with_name("fetch_worker.py"), timeout=120)
    told = json.loads(next(line for line in out.splitlines() if line.startswith('{"')))
    assert told["far"] > 0 and told["trained"] > 0, "something was elsewhere, and something was trained"
