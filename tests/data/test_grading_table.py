"""Every row of grading_table.jsonl: what each verifier says to a truth and a response, and why.

`want` null: the truth cannot be graded, so the verifier raises (the sample is lost, never rewarded) and the loader
refuses the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from treepo_mega.data.rewards.answers import as_number, find_answer, settle
from treepo_mega.data.rewards.truths import check_truth
from treepo_mega.data.rewards.verifiers import load_verifier

TABLE = [json.loads(line) for line in Path(__file__).with_name("grading_table.jsonl").read_text().splitlines()]


@lru_cache
def verifier(name: str) -> Callable[..., Any]:
    return load_verifier(name)


@pytest.mark.parametrize("row", TABLE, ids=[f"{n}-{row['reason']}" for n, row in enumerate(TABLE, 1)])
def test_row(row: dict[str, Any]) -> None:
    grade = verifier(row["verifier"])
    fields = {"data_source": "x", "solution_str": row["response"], "ground_truth": row["truth"]}
    if row["want"] is None:
        assert check_truth(row["verifier"], row["truth"])
        with pytest.raises(ValueError, match="ground truth"):
            grade(**fields)
        return
    assert check_truth(row["verifier"], row["truth"]) is None
    result = grade(**fields)
    assert (result["score"] if isinstance(result, dict) else result) == row["want"], row["reason"]


def test_the_table_is_large_and_has_no_row_twice() -> None:
    assert len(TABLE) >= 150
    assert len({(row["verifier"], row["truth"], row["response"]) for row in TABLE}) == len(TABLE)
    assert all(row["reason"] for row in TABLE)


@pytest.mark.parametrize(
    "piece", ["\\text{", "answer is ", "<answer>", "(A) ", "\\$", "{,}", "</think>", " ", "\\", "answer" + " " * 50]
)
def test_reading_an_answer_is_linear_in_hostile_text(piece: str) -> None:
    """200,000 characters of each; a quadratic pattern would take minutes."""
    text = piece * (200_000 // len(piece))
    answer = find_answer(text)
    for truth in ("42", "B", "listen", "10:30"):
        settle(truth, answer)
    assert as_number(text) is None
