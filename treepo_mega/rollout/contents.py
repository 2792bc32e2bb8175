"""Whole trees on rank 0, which writes them: those that a step keeps for people, and those that a checkpoint keeps.

Both are for few trees. What trains gets its tokens by `actor/fetch.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from treepo_mega.rollout.jobs import Job, stored
from treepo_mega.rollout.report import lend_contents
from treepo_mega.runtime import dist
from treepo_mega.runtime.parcels import tell_main
from treepo_mega.tree.node import Tree


def waiting_at_main(
    carried: Sequence[Job], surplus: Sequence[Tree], *, timeout_s: float
) -> dict[str, list[dict[str, Any]]]:
    """Trees that wait for another step as a checkpoint keeps them, on rank 0; on others, nothing.

    Each is sent by the rank that speaks for its engine, and to rank 0 alone. Collective over all ranks, unless every
    rank holds them all. Raises RankLost and PackedError, which name the rank that is late or sent damage.
    """
    homes = {*(job.home for job in carried), *(tree.home for tree in surplus)}
    own: dict[str, list[list[Any]]] = {
        "carried": [[index, stored(job)] for index, job in enumerate(carried) if _is_mine(job)],
        "surplus": [[index, tree.to_dict()] for index, tree in enumerate(surplus) if _is_mine(tree)],
    }
    parts = [own] if dist.is_main() else []
    if homes - {None}:
        says = None if dist.is_main() or not any(own.values()) else own
        parts += tell_main(says, what="trees that wait for another step", timeout_s=timeout_s).values()
    # In their order, not that of ranks: a checkpoint is the same whichever engine holds what.
    entries = {name: sorted(chain.from_iterable(part[name] for part in parts), key=_index) for name in own}
    return {name: [tree for _, tree in of_name] for name, of_name in entries.items()}


def bring_to_main(trees: Sequence[Tree], *, timeout_s: float) -> None:
    """Give `trees` their contents on rank 0. Collective over all ranks, unless all trees are everywhere."""
    if all(tree.home is None for tree in trees):
        return
    own = [] if dist.is_main() else [[index, tree.to_dict()] for index, tree in enumerate(trees) if _is_mine(tree)]
    for told in tell_main(own or None, what="trees to write", timeout_s=timeout_s).values():
        for index, of_tree in told:
            near = Tree.from_dict(of_tree)
            lend_contents(trees[index], near)
            # Whole numbers became fractions on their way here: what is written must not tell.
            trees[index].counts = near.counts


def _is_mine(each: Job | Tree) -> bool:
    """Whether this rank speaks for it; rank 0 does for what every rank holds."""
    return (0 if each.home is None else each.home) == dist.rank()


def _index(entry: Sequence[Any]) -> int:
    return int(entry[0])
