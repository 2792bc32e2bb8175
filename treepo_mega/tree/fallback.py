"""Fallback: where to sample anew when every path of a tree has ended and leaves are missing.

Ended paths are taken in an order that `rollout.fallback.from` names, and each is cut back to a segment border strictly
before its end (`rollout.fallback.cut`; the prompt's end is a border too). The new children join an existing node, so
that a trajectory stays exactly a root-to-leaf path, and what they are conditioned on is rebuilt from the tree.

    finished    paths that ended with an answer or EOS, shuffled (the released code's soft_boxed_and_eos)
    any         all ended paths, shuffled
    longest     all ended paths, longest response first, equals in random order
    none        no fallback: the tree keeps fewer leaves, and says so
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from treepo_mega.tree.node import Tree


def _finished(tree: Tree, rng: random.Random) -> list[int]:
    found = [i for i in tree.leaves if tree.nodes[i].stop in ("answer", "eos")]
    rng.shuffle(found)
    return found


def _any(tree: Tree, rng: random.Random) -> list[int]:
    found = list(tree.leaves)
    rng.shuffle(found)
    return found


def _longest(tree: Tree, rng: random.Random) -> list[int]:
    # Shuffled first; sorting is stable, so responses of one length stay in random order.
    return sorted(_any(tree, rng), key=lambda i: -len(tree.response(i)))


CANDIDATES: dict[str, Callable[[Tree, random.Random], list[int]]] = {
    "finished": _finished,
    "any": _any,
    "longest": _longest,
}
"""Leaves to cut back, in order, by `rollout.fallback.from` (all but none)."""


def cut(tree: Tree, leaf: int, where: str, rng: random.Random) -> int:
    """A node on the path to `leaf`, strictly before its end (root included): where to sample anew.

    random: drawn uniformly. low_prob: the border after which the path's first token was the least probable, the
    earliest of equals.
    """
    # Never the leaf itself: nothing may be sampled after the end of a path.
    path = tree.ancestry(leaf)
    if where == "random":
        return rng.choice(path[:-1])
    return min(pairwise(path), key=lambda step: tree.nodes[step[1]].logprobs[0])[0]
