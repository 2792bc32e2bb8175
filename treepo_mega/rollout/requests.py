"""Requests to the engine on behalf of trees: their names, and what has come of them.

A request is named by the rank of its tree and the path of its node, so that what finishes finds its way back.
"""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mega.engine.stream import SegmentStream
from treepo_mega.rollout.admission import Key, Path
from treepo_mega.tree.node import Tree


@dataclass(slots=True)
class SegmentRun:
    """One stream of the engine: the segment it began with, and the tokens that its tree has got of it."""

    first: Key
    stream: SegmentStream
    prefix_tokens: int = 0
    delivered_tokens: int = 0


def request_name(key: Key) -> str:
    """A request's name: the tree's rank and the node's path.

    >>> request_name((3, (0, 1))), request_key("3:0.1")
    ('3:0.1', (3, (0, 1)))
    """
    return f"{key[0]}:{'.'.join(map(str, key[1]))}"


def request_key(name: str) -> Key:
    """The inverse of `request_name`."""
    rank, _, path = name.partition(":")
    return int(rank), tuple(map(int, path.split(".")))


def spans_of(tree: Tree) -> dict[Path, tuple[int, int]]:
    """Path -> (tokens before the node, tokens up to its end, prompt included), of the nodes that have tokens."""
    spans: dict[Path, tuple[int, int]] = {}
    # Parents come before their children.
    for node in tree.nodes:
        begin = spans[node.path[:-1]][1] if node.path else 0
        if node.tokens:
            spans[node.path] = (begin, begin + len(node.tokens))
    return spans
