"""Which trees train: those that are neither nearly solved nor nearly hopeless.

rollout.filter_metric=examples/plugins/filter.py:neither_easy_nor_hopeless
"""

from __future__ import annotations

from treepo_mega.tree.node import Tree


def neither_easy_nor_hopeless(tree: Tree) -> bool:
    """Whether between 10 % and 90 % of the answers are right, before any penalty."""
    right = sum(verdict > 0.5 for verdict in tree.verdicts)
    return 0.1 <= right / len(tree.verdicts) <= 0.9
