"""A whole graded tree as a record: its columns, and beside them the tokens that columns leave out.

record = to_record(tree)         # for `packed.pack`: 8 bytes a token and its experts, and 20 to 60 a segment
tree = to_tree(record)           # equal, number by number and type by type
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from treepo_mega.tree.columns import from_columns, to_columns
from treepo_mega.tree.node import Tree
from treepo_mega.tree.routing import Experts

CONTENTS = ("tokens", "logprobs", "entropies", "peek")
"""Lists of a node that `tree/columns.py` leaves out."""


def to_record(tree: Tree) -> dict[str, Any]:
    """See the module docstring. Raises ColumnsError for children that their paths do not order."""
    return {
        "prompt": tree.prompt_id,
        # Apart from the columns, which make fractions of whole numbers.
        "counts": tree.counts,
        "columns": to_columns([tree]),
        **{name: _ragged([getattr(node, name) for node in tree.nodes]) for name in CONTENTS},
        **_experts(tree),
    }


def to_tree(record: dict[str, Any]) -> Tree:
    """The inverse of `to_record`."""
    (tree,) = from_columns(record["columns"], [record["prompt"]])
    tree.counts = dict(record["counts"])
    for name in CONTENTS:
        for node, held in zip(tree.nodes, _rows(record[name]), strict=True):
            setattr(node, name, held)
    if "experts" in record:
        ids = record["experts"]["ids"]
        ends = np.cumsum(record["experts"]["size"], dtype=np.int64).tolist()
        for node, begin, end in zip(tree.nodes, [0, *ends[:-1]], ends, strict=True):
            node.experts = Experts(ids[begin:end])
    return tree


def _experts(tree: Tree) -> dict[str, Any]:
    """What the nodes have noted of the engine's routing, as one array; nothing where they have nothing."""
    noted = [node.experts for node in tree.nodes]
    if not any(map(len, noted)):
        return {}
    size = np.array(list(map(len, noted)), np.int32)
    return {"experts": {"size": size, "ids": np.concatenate([each.ids for each in noted if len(each)])}}


def _ragged(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Rows of numbers of one type, which `packed.pack` makes the smallest exact array of."""
    return {"size": np.array(list(map(len, rows)), np.int32), "value": list(chain.from_iterable(rows))}


def _rows(ragged: dict[str, Any]) -> list[list[Any]]:
    ends = np.cumsum(ragged["size"], dtype=np.int64).tolist()
    return [ragged["value"][end - size : end] for end, size in zip(ends, ragged["size"].tolist(), strict=True)]
