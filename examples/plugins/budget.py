"""Who gets the branches: paths with a token that surprised the model.

rollout.branching.budget.kind=examples/plugins/budget.py:most_surprised
"""

from __future__ import annotations

from collections.abc import Sequence

from treepo_mega.tree.node import Node


def most_surprised(total: int, paths: Sequence[Node]) -> list[int]:
    """One for each path; the rest in turn, beginning with the path whose least probable token was least probable."""
    order = sorted(range(len(paths)), key=lambda place: min(paths[place].logprobs))
    split = [1] * len(paths)
    for extra in range(total - len(paths)):
        split[order[extra % len(order)]] += 1
    return split
