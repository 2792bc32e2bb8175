"""Rows of reasoning-gym in environments: the entry that a row stands for, and the task that knows its rules.

A row of a source `data.train.<i>.reasoning_gym` names its item, which is made again: entries hold tuples, which JSON
turns into lists, and some scorers misjudge those. A row of a file may hold `metadata`, as reasoning-gym writes it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any


class GymRow:
    """An item of a reasoning-gym task. `name`: of the task; `entry`: as the task made it."""

    def __init__(self, name: str, task: Any, entry: dict[str, Any]) -> None:
        self.name = name
        self.task = task
        self.entry = entry

    def score(self, answer: str) -> float:
        """What the task's own rules give for an answer, 0 to 1."""
        return float(self.task.score_answer(answer, self.entry))


def gym_row(row: Mapping[str, Any]) -> GymRow | None:
    """The item that a row stands for; None for a row of something else.

    Raises ValueError for an item that is not the row's question any more.
    """
    extra = row.get("extra_info") or {}
    if "reasoning_gym" in extra:
        named = extra["reasoning_gym"]
        task = _task(named["name"], json.dumps(named["params"], sort_keys=True), named["seed"], named["size"])
        entry = task[named["index"]]
        if entry["question"] != extra["entry"]["question"]:
            raise ValueError(f"reasoning_gym: item {named['index']} of {named['name']} is another question now")
        return GymRow(named["name"], task, entry)
    name = (row.get("metadata") or {}).get("source_dataset")
    if name is None:
        return None
    return GymRow(name, _task(name, "{}", 0, 1), {"answer": row["answer"], "metadata": row["metadata"]})


@functools.lru_cache(maxsize=64)
def _task(name: str, params: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(params), seed=seed, size=size)
