"""Reshards really carried out on four ranks: one start, many layouts, bit-equal to slicing the HF tensors."""

import json
from pathlib import Path

from tests.ranks import run_ranks
from tests.reshard.execute_worker import CASES

WORKER = Path(__file__).with_name("execute_worker.py")


def test_every_layout_arrives_bit_equal_at_the_lower_bound():
    out = run_ranks(4, WORKER, timeout=240)
    results = [json.loads(line.removeprefix("CASE ")) for line in out.splitlines() if line.startswith("CASE ")]
    assert len(results) == len(CASES)
    for r in results:
        assert r["moved"] == r["bound"], r
    assert max(r["rounds"] for r in results) > 10
    assert results[0]["moved"] == 0, "every rank has the whole model: nothing to send"
