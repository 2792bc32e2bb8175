"""Every bad input of docs/errors.md is given, and answered as the page says."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.errors.case import BadInput, matches
from tests.errors.matrix import CASES

AREAS = {"Configuration", "Prompts", "Rewards", "Models and checkpoints", "Resuming and stopping", "Clusters"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.given}")
def test_a_bad_input_is_answered_as_the_page_says(case: BadInput, tmp_path):
    message = case.answer(tmp_path)
    assert matches(case.says, message), f"the page says\n  {case.says}\nand the answer was\n  {message}"
    assert "Traceback" not in message


def test_the_page_covers_what_people_give():
    assert len(CASES) >= 60
    assert {case.area for case in CASES} >= AREAS
    assert [given for given, count in Counter((case.area, case.given) for case in CASES).items() if count > 1] == []
