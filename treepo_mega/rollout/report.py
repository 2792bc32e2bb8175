"""What an engine tells all ranks of the trees that it sampled: structure, grades and numbers, without tokens.

    report = told(rows)                                  # on the rank that had the trees graded
    rows = heard(report, jobs, home=speaker)             # on every other rank: trees whose contents are elsewhere

Columns and not dicts: 20 to 60 bytes a segment, and no JSON but for a few names. What needs contents is computed by
`told` and travels as numbers: how different the leaves of a tree are, and which of their tokens are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treepo_mega.config import Config
from treepo_mega.errors import TreepoError
from treepo_mega.tree.columns import from_columns, to_columns
from treepo_mega.tree.diversity import common_tokens, distinct_responses, effective_samples
from treepo_mega.tree.elsewhere import is_here
from treepo_mega.tree.merge import compare
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.rollout.jobs import Job

TREE = "tree"
"""Key of a row that holds a `Tree`."""


class ReportError(TreepoError):
    """Ranks of one engine hold different trees; the message names prompt and node."""


def complete(tree: Tree, cfg: Config, home: int | None) -> Tree:
    """Write into a graded tree what other ranks cannot find out for themselves. `home`: this rank, if there are others.

    `counts` get distinct (responses), effective (samples), common_tokens and common_pairs (`tree/diversity.py`).
    """
    tokens, pairs = common_tokens(tree)
    tree.counts |= {
        "distinct": distinct_responses(tree),
        "effective": effective_samples(tree),
        "common_tokens": tokens,
        "common_pairs": pairs,
    }
    tree.home = home
    tree.alike = compare(tree) if home is not None and cfg.train.prefix_sharing == "content" else None
    return tree


def told(rows: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """A report of `rows` by the index of their job, for `packed.pack`."""
    names = sorted({name for row in rows.values() for name in row if name != TREE})
    report: dict[str, Any] = {
        "jobs": np.array(list(rows), np.int32),
        "values": {name: _column([row[name] for row in rows.values()]) for name in names},
    }
    if any(TREE in row for row in rows.values()):
        report["trees"] = to_columns([row[TREE] for row in rows.values()])
    return report


def heard(report: Mapping[str, Any], jobs: Sequence[Job], *, home: int | None) -> dict[int, dict[str, Any]]:
    """The rows of a report; contents of their trees are on the rank `home`."""
    indices = report["jobs"].tolist()
    rows: list[dict[str, Any]] = [{} for _ in indices]
    for name, column in report["values"].items():
        for row, value in zip(rows, _values(column), strict=True):
            row[name] = value
    if "trees" in report:
        trees = from_columns(report["trees"], [jobs[index].prompt.id for index in indices])
        for row, tree in zip(rows, trees, strict=True):
            tree.home = home
            row[TREE] = tree
    return dict(zip(indices, rows, strict=True))


def lend_contents(far: Tree, near: Tree) -> None:
    """Give `far`, whose contents are elsewhere, those of `near`, the same tree on another rank of its engine.

    Raises ReportError where they differ.
    """
    for theirs, ours in zip(far.nodes, near.nodes, strict=True):
        if len(theirs.tokens) != len(ours.tokens) or theirs.path != ours.path:
            raise ReportError(
                f"prompt {far.prompt_id!r}, node {ours.id}: the first rank of the engine has {len(theirs.tokens)} "
                f"tokens at {theirs.path}, and this one {len(ours.tokens)} at {ours.path}. Ranks of an engine must "
                "sample alike"
            )
        if not is_here(theirs.tokens):
            theirs.tokens = ours.tokens
            theirs.logprobs = ours.logprobs
            theirs.entropies = ours.entropies
            theirs.peek = ours.peek
            theirs.experts = ours.experts


def _column(values: Sequence[Any]) -> dict[str, Any]:
    """One column of a table: an array where the values allow it."""
    kinds = set(map(type, values))
    if kinds == {bool}:
        return {"bool": np.array(values, np.int8)}
    if kinds == {int} and all(-(2**31) <= value < 2**31 for value in values):
        return {"int": np.array(values, np.int32)}
    if kinds == {float}:
        return {"float": np.array(values, np.float64)}
    if kinds == {list} and {type(entry) for value in values for entry in value} <= {float, type(None)}:
        # Grades: numbers, and None for those that were lost.
        flat = [entry for value in values for entry in value]
        return {
            "size": np.array(list(map(len, values)), np.int32),
            "entry": np.array([0.0 if entry is None else entry for entry in flat], np.float64),
            "none": np.array([entry is None for entry in flat], np.int8),
        }
    return {"plain": list(values)}


def _values(column: Mapping[str, Any]) -> list[Any]:
    """The values of `_column`."""
    if "size" in column:
        flat = [
            None if is_none else entry
            for entry, is_none in zip(column["entry"].tolist(), column["none"].tolist(), strict=True)
        ]
        ends = np.cumsum(column["size"], dtype=np.int64)
        return [flat[end - size : end] for end, size in zip(ends.tolist(), column["size"].tolist(), strict=True)]
    if "plain" in column:
        return list(column["plain"])
    ((kind, array),) = column.items()
    return [bool(value) for value in array] if kind == "bool" else array.tolist()
