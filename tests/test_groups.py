"""Which tests stay together in one of two processes."""

from __future__ import annotations

import re

import pytest

from tests.groups import GROUPS, TESTS, group_of, make_scheduler

STARTS = re.compile(r"\b(run_ranks|run_world|launch_ranks|start_ranks)\(|\bengine: Engine\b")
"""What only a file of a group may do: start ranks, or use an engine in the test process."""


@pytest.mark.parametrize("group", GROUPS)
def test_every_member_is_there_and_in_no_other_group(group):
    for member in GROUPS[group]:
        assert (TESTS / member).exists(), member
        assert group_of(TESTS / member) == group, member


def test_a_file_that_starts_ranks_or_an_engine_has_a_group():
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if STARTS.search(path.read_text(encoding="utf-8"))]
    assert len(files) > 15
    assert [str(path) for path in files if group_of(path) not in GROUPS] == []


def test_a_file_without_a_group_is_one_of_its_own():
    assert group_of(TESTS / "tree" / "test_stop.py") == "tree/test_stop.py"
    assert group_of(TESTS.parent / "treepo_mega" / "cli.py") not in GROUPS


def test_the_scheduler_hands_out_the_groups():
    """By a method that xdist asks, and not by its own marks, which have no effect with this pytest."""
    from xdist.scheduler import LoadScopeScheduling

    assert callable(LoadScopeScheduling._split_scope), "xdist asks something else now"

    class Config:
        rootpath = TESTS.parent

        @staticmethod
        def getvalue(name: str) -> list[str]:
            return ["popen"]

    scheduler = make_scheduler(Config, None)
    assert scheduler._split_scope("tests/actor/test_trees.py::test_x[1-a::b]") == "layouts"
    assert scheduler._split_scope("tests/tree/test_stop.py::test_x") == "tree/test_stop.py"
