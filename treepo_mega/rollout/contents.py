"""Whole trees where their structure is not enough: on rank 0, which writes some, and on ranks that may go on with them.

Both are for few trees. What trains gets its tokens by `actor/fetch.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treepo_mega.rollout.report import lend_contents
from treepo_mega.runtime import dist
from treepo_mega.runtime.parcels import tell_main
from treepo_mega.tree.node import Tree


def everywhere(trees: Sequence[Tree]) -> list[dict[str, Any]]:
    """Whole trees as dicts, on every rank, in order. Collective over all ranks."""
    told = dist.tell_all(_own(trees) or None)
    whole = {index: tree for of_rank in told.values() for index, tree in of_rank}
    return [whole[index] for index in range(len(trees))]


def bring_to_main(trees: Sequence[Tree], *, timeout_s: float) -> None:
    """Give `trees` their contents on rank 0. Collective over all ranks, unless all trees are everywhere."""
    if all(tree.home is None for tree in trees):
        return
    own = [] if dist.is_main() else _own(trees)
    for told in tell_main(own or None, what="trees to write", timeout_s=timeout_s).values():
        for index, stored in told:
            near = Tree.from_dict(stored)
            lend_contents(trees[index], near)
            # Whole numbers became fractions on their way here: what is written must not tell.
            trees[index].counts = near.counts


def _own(trees: Sequence[Tree]) -> list[list[Any]]:
    """[index, dict] of the trees that this rank speaks for; rank 0 does for those that every rank holds."""
    return [
        [index, tree.to_dict()]
        for index, tree in enumerate(trees)
        if (0 if tree.home is None else tree.home) == dist.rank()
    ]
