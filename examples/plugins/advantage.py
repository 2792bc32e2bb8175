"""An advantage of your own: what a branch was worth beside its siblings.

algo.advantage_estimator=examples/plugins/advantage.py:against_siblings
"""

from __future__ import annotations

from treepo_mega.tree.node import Tree


def against_siblings(tree: Tree) -> list[float]:
    """One number a node: the mean reward of the leaves below it, minus that of its siblings' leaves.

    An only child continues its parent's segment and has its advantage.
    """
    below = tree.leaves_below()
    out = [0.0] * len(tree.nodes)
    for node in tree.nodes[1:]:  # parents come before their children
        if node.id not in below:
            continue
        siblings = [child for child in tree.nodes[node.parent].children if child in below and child != node.id]
        if siblings:
            others = [tree.rewards[leaf] for child in siblings for leaf in below[child]]
            own = [tree.rewards[leaf] for leaf in below[node.id]]
            out[node.id] = sum(own) / len(own) - sum(others) / len(others)
        else:
            out[node.id] = out[node.parent]
    return out
