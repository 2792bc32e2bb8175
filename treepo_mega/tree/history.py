"""Where a chat template rewrites history: what a path says, and what its next token sees, are two things.

A template may drop the reasoning of a turn as soon as tools have answered it. The observation behind that turn then
hides the end of its path (`Node.hidden` tokens) and says something else in its place (its own first `Node.restated`
tokens). The trajectory is all that was said, and credit follows it: a reward teaches hidden turns, too. The context is
what is left, and attention, positions and caches follow that.

    trajectory   prompt | think call eos | call eos answer | think done eos
    context      prompt |                | call eos answer | think done eos
                          hidden: 3        restated: 2

So a forest has two parents for each segment, which differ at such observations alone. `Segments.parent` is that of the
context, and every token that is trained is trained in the context that it was sampled in. `Trajectories` holds the
other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treepo_mega.tree.sums import Bools, Ints

if TYPE_CHECKING:
    from treepo_mega.tree.node import Tree


@dataclass(frozen=True, slots=True)
class Observation:
    """What comes behind a turn of the policy: ids from the end of the turn to where the policy goes on."""

    tokens: list[int]
    hidden: int = 0
    """Tokens of the context before it, counted from its end, that are seen no more from here on."""
    restated: int = 0
    """First ones of `tokens`, which stand for what is hidden: no tool said them."""


def context(tree: Tree, node_id: int, hidden: int = 0) -> list[tuple[int, int]]:
    """(node, how many of its first tokens are seen) from the root to `node_id`, without the last `hidden` tokens.

    Nodes of which nothing is seen are left out.

    >>> from treepo_mega.tree.node import Tree
    >>> tree = Tree.start("p", [1, 2])
    >>> turn = tree.add_child(0)
    >>> turn.tokens, turn.logprobs = [5, 6, 7], [-0.5, -0.6, -0.7]
    >>> context(tree, tree.observe(turn.id, [6, 7, 8], hidden=4, restated=2).id)
    [(0, 1), (2, 3)]
    """
    seen = []
    while node_id >= 0:
        node = tree.nodes[node_id]
        left = max(0, len(node.tokens) - hidden)
        if left:
            seen.append((node_id, left))
        hidden += node.hidden - (len(node.tokens) - left)
        node_id = node.parent
    return seen[::-1]


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What the segments of a forest say one after the other, where that is not what their tokens see."""

    before: Ints
    """[S] the segment before it in its trajectories, -1 for a root. Every segment comes after the one before it."""
    leaf: Ints
    """[L] the segment at which each trajectory ends, in the caller's order."""
    part: Ints
    """[S] the part of a node that each segment is a copy of, numbered over all trees (`Parts`)."""


@dataclass(frozen=True, slots=True)
class Ends:
    """E ends of contexts by their number. The first are leaves in the caller's order; the others are hidden turns."""

    trajectory: Ints
    """[E] the first trajectory that has this end."""
    flat: Ints
    """[E] tokens of a leaf's trajectory if each of its contexts were computed by itself; 0 for hidden turns."""
    leaves: int
    """How many are leaves."""


@dataclass(frozen=True, slots=True)
class Parts:
    """C parts of the nodes of a forest, by node: nodes are cut where a context ends within them."""

    node: Ints
    """[C] the node that it is a part of."""
    offset: Ints
    """[C] tokens of the node before it."""
    length: Ints
    """[C] tokens."""
    before: Ints
    """[C] the part before it in a trajectory, -1 for a root."""
    context: Ints
    """[C] the last part that its first token sees, -1 for a root."""
    last: Ints
    """[nodes] the last part of each node."""


def has_hidden(trees: Sequence[Tree]) -> bool:
    """Whether a trajectory of these trees is not what its last token sees."""
    return any(node.hidden for tree in trees for node in tree.nodes)


def _context_ends(trees: Sequence[Tree]) -> dict[int, tuple[int, int]]:
    """Nodes that hide something -> (node, how many of its first tokens): where their contexts end."""
    ends = {}
    first = 0
    for tree in trees:
        for node in tree.nodes:
            if node.hidden:
                at, seen = context(tree, node.parent, node.hidden)[-1]
                ends[first + node.id] = (first + at, seen)
        first += len(tree.nodes)
    return ends


def count_parts(tree: Tree) -> int:
    """How many parts the nodes of a tree have."""
    ends = set(_context_ends([tree]).values())
    return len(tree.nodes) + sum(seen < len(tree.nodes[at].tokens) for at, seen in ends)


def parts_of(trees: Sequence[Tree], parent_of_node: Ints, length_of_node: Ints) -> Parts:
    """The parts of all nodes, numbered over `trees`; `parent_of_node` [nodes] is numbered so, -1 for roots."""
    ends = _context_ends(trees)
    cuts = sorted({(at, seen) for at, seen in ends.values() if seen < length_of_node[at]})
    count = 1 + np.bincount(np.array([at for at, _ in cuts], np.int64), minlength=len(parent_of_node))
    last = np.cumsum(count) - 1
    node = np.repeat(np.arange(len(parent_of_node)), count)
    opens = np.zeros(len(node), np.bool_)
    opens[last - count + 1] = True
    offset = np.zeros(len(node), np.int64)
    # Cuts are sorted by node and place, as parts are.
    offset[~opens] = [seen for _, seen in cuts]
    end = np.append(offset[1:], 0)
    end[last] = length_of_node
    above = np.where(parent_of_node >= 0, last[np.maximum(parent_of_node, 0)], -1)
    before = np.where(opens, above[node], np.arange(len(node)) - 1)
    sees = before.copy()
    place_of_cut = {cut: place for place, cut in enumerate(cuts)}
    cut_nodes = np.array([at for at, _ in cuts], np.int64)
    for hiding, (at, seen) in ends.items():
        # A node's first part ends at its first cut.
        place = place_of_cut.get((at, seen))
        first = last[at] - count[at] + 1
        ended = last[at] if place is None else first + place - np.searchsorted(cut_nodes, at)
        sees[last[hiding] - count[hiding] + 1] = ended
    return Parts(node, offset, end - offset, before, sees, last)


def contexts_end(context: Ints, leaves: Ints, reached: Bools) -> Ints:
    """The segments, beside `leaves`, at which a context ends: those that trajectories reach, with nothing behind them.

    `context` [C]: the last segment that each one sees. `reached` [C]: whether a trajectory goes through it.
    """
    goes_on = np.zeros(len(context), np.bool_)
    goes_on[context[reached & (context >= 0)]] = True
    goes_on[leaves] = True
    return np.flatnonzero(reached & ~goes_on)
