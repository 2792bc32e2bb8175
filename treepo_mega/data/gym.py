"""reasoning-gym items, made in a process of their own.

    items = make_items("chain_sum", {"max_terms": 2, "min_terms": 2}, seed=0, size=512)

Some tasks (isomorphic_strings, knight_swap, polynomial_multiplication, ransom_note, word_ladder in 0.1.25)
iterate over sets of strings, so their items change with Python's hash seed: every rank would see other
prompts under the same ids, and a resumed run yet others. The helper process runs with PYTHONHASHSEED=0, as
the graders do. It also keeps 3 s of imports and their side effects out of the trainer.

`python -m treepo_mega.data.gym` reads one JSON request on stdin and prints one JSON line an item.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from treepo_mega.data.rewards.grader import worker_environment
from treepo_mega.errors import TreepoError, nearest

TIMEOUT_S, TIMEOUT_PER_ITEM_S = 300.0, 0.1
"""Deadline for making one source's items: a fixed part, and a part per item (slow tasks take 0.02 s an item)."""


class GymError(TreepoError):
    """A reasoning-gym source that cannot be made: unknown task (with the nearest names), bad parameters."""


def make_items(name: str, params: dict[str, Any], *, seed: int, size: int) -> list[dict[str, Any]]:
    """`size` items `{"question", "answer", "metadata"}` of task `name`; answers as text.

    Raises GymError for an unknown task, parameters it refuses, and a helper that dies or passes its deadline.
    """
    deadline = TIMEOUT_S + size * TIMEOUT_PER_ITEM_S
    request = json.dumps({"name": name, "params": params, "seed": seed, "size": size})
    what = f"reasoning_gym: {name}"
    try:
        # Another process, because Python reads PYTHONHASHSEED at its start and never again.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "treepo_mega.data.gym"],
            input=request,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=deadline,
            env=worker_environment(),
        )
    except subprocess.TimeoutExpired:
        raise GymError(f"{what}: making {size} items took more than {deadline:g} s") from None
    if done.returncode != 0:
        raise GymError(f"{what}: the helper died (exit code {done.returncode}): {done.stderr.strip()[-800:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if lines and "error" in lines[-1]:
        raise GymError(f"{what}: {lines[-1]['error']}")
    if len(lines) != size:
        raise GymError(f"{what}: {len(lines)} items made, {size} asked for")
    return lines


def _make(request: dict[str, Any]) -> list[dict[str, Any]]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name = request["name"]
    if name not in DATASETS:
        raise GymError(f"unknown task {name!r}{nearest(name, DATASETS) or '; known: ' + ', '.join(sorted(DATASETS))}")
    try:
        task = reasoning_gym.create_dataset(name, **request["params"], seed=request["seed"], size=request["size"])
    except (TypeError, ValueError, AssertionError) as e:
        raise GymError(f"params {request['params']}: {e}") from None
    entries = (task[i] for i in range(request["size"]))
    return [{"question": e["question"], "answer": str(e["answer"]), "metadata": e["metadata"]} for e in entries]


def main() -> None:
    """Entry point of the helper: nothing but items reaches stdout, whatever the library prints."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        items: list[dict[str, Any]] = _make(json.load(sys.stdin))
    except GymError as e:
        items = [{"error": str(e)}]
    with out:
        for item in items:
            # default=str: some tasks keep dates and fractions; the grader remakes the entry and needs none of this.
            out.write(json.dumps(item, default=str) + "\n")


if __name__ == "__main__":
    main()
