"""The simulation behind docs/scaling.md: trees in time, and the page that is generated from them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import scaling  # noqa: E402
from treepo_mega.config import load_config  # noqa: E402
from treepo_mega.plan.lengths import MeasuredLengths  # noqa: E402


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_tree_in_time_starts_segments_where_others_end():
    rollout = scaling.units_of(load_config(scaling.RECIPE, []), "tree")
    segments = scaling.grow(rollout, 3, lambda depth: 0.0)
    length = rollout.segment.length
    # Nothing ends before the limit: levels of whole segments, 16 paths at the end, fewer before.
    assert {size for _, size in segments} == {length}
    running = scaling.profile(segments, rollout.max_response_len)
    assert running[-1] == 16 and 2 <= running[0] <= 8 and (running[1:] >= running[:-1]).all()
    again = scaling.grow(rollout, 3, lambda depth: 0.0)
    assert again == segments


def test_the_page_says_what_the_simulation_found():
    rows = scaling.simulate((16, 256))
    measured = MeasuredLengths("a run", 4, (10.0, 10.0, 10.0, 40.0), 20.0, (7,))
    again = scaling.simulate((16, 256), measured)
    text = scaling.page(rows, again, measured)
    assert text.count("\n| 16 |") == 3 and text.count("\n| 256 |") == 3
    # Three of four end at a quarter of the limit: engines wait longer for the fourth.
    assert again[0]["idle"] > rows[0]["idle"] and "2.29 times" in text and "(`a run`, steps 7)" in text
    fixed = [row for row in rows if row["batch"] == "fixed"]
    assert fixed[1]["idle"] > fixed[0]["idle"] and fixed[1]["step_s"] < fixed[0]["step_s"]
    assert f"{fixed[0]['rollout_s']:.1f}" in text
