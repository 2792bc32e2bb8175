"""A graded tree that gets more leaves: which leaves are new, and all grades in one tree again. Pure.

    search = TreeSearch(..., begun=before)      # more leaves are asked for than `before` has
    new = new_leaves(search.tree, before)       # what is to be graded: the tree with its new leaves alone
    tree = with_grades(new, before)             # ... and, once `new` is graded, the tree with all leaves and grades

Growing renumbers nodes and may cut segments in two. A leaf keeps its decisions (`tree/fork.py`), which name it here.
"""

from __future__ import annotations

from dataclasses import replace

from treepo_mega.tree.fork import decisions
from treepo_mega.tree.node import Tree


def ungraded(before: Tree) -> Tree:
    """A copy of a graded tree without its grades, to grow on; what was missing of it is missing no more."""
    copy = Tree.from_dict(before.to_dict())
    return replace(copy, rewards=[], verdicts=[], shortfall=None)


def new_leaves(tree: Tree, before: Tree) -> Tree:
    """The tree with the leaves alone that `before`, from which it grew, does not have."""
    old = {_name(before, leaf) for leaf in before.leaves}
    return tree.only([index for index, leaf in enumerate(tree.leaves) if _name(tree, leaf) not in old])


def with_grades(new: Tree, before: Tree) -> Tree:
    """`new`, whose leaves are graded, with the leaves and grades of `before` as well, in the order of a grown tree."""
    ends = {_name(new, node.id): node.id for node in new.nodes if node.stop is not None}
    graded = list(zip(new.leaves, new.rewards, new.verdicts, strict=True))
    graded += [
        (ends[_name(before, leaf)], reward, verdict)
        for leaf, reward, verdict in zip(before.leaves, before.rewards, before.verdicts, strict=True)
    ]
    # As `Tree.renumber` has them, which is not the order of ids where a fallback made nodes.
    graded.sort(key=lambda leaf: (new.nodes[leaf[0]].level, new.nodes[leaf[0]].path))
    return replace(
        new,
        leaves=[leaf for leaf, _, _ in graded],
        rewards=[reward for _, reward, _ in graded],
        verdicts=[verdict for _, _, verdict in graded],
    )


def _name(tree: Tree, leaf: int) -> tuple[int, ...]:
    return tuple(decisions(tree, leaf))
