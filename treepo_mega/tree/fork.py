"""Forks: which tokens of ended paths become branch points, when branches start where the model was uncertain.

    forks = most_uncertain(tree, 4, signal="entropy", distance=4)     # rule "rank"
    forks = first_crossings(tree, 16, threshold=1.0, factor=2, distance=4)     # rule "threshold"
    for parent, fork in open_forks(tree, forks): ...                  # `fork.branches` new children of `parent`

A fork at token t draws that token again: its branch is conditioned on everything before t. The tree is at rest (every
path has ended, nodes are renumbered), and a choice depends on nothing else, so it is the same for every order of
arrival. Beside where a branch has started, a fork is at the same token or `distance` tokens away, along the path.

`rank` takes the tokens of the whole tree that are worth most. What is worth a fork is a *place*, the tokens before it:
where paths are copies of one another, and where branches part, the first token there stands for all. By the signal
`entropy` a place where n tokens were drawn is worth its entropy / n, by `logprob` the probability that the tokens
drawn there leave over. There is always one more fork. Whether a token is chosen depends on all that was sampled after
it, so these branches are no fair samples (`tree/descent.py`).

`threshold` forks a path at its first token above a threshold, and each branch at its own first one, while the leaves
that the path may grow into last. Whether a token is chosen depends on what precedes it alone: the branches might as
well have started together, so they are fair samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mega.tree.node import ROOT, ForkRule, Node, Tree
from treepo_mega.tree.segments import Bools, Floats, Ints

TIE = 1e-5
"""Nats. Copies of a path have the same entropies, but for rounding in another batch: the first one is taken."""


@dataclass(frozen=True, slots=True)
class Fork:
    """`branches` new paths start before token `offset` of `node`; `uncertainty`: of that token, by the signal."""

    node: int
    offset: int
    branches: int
    uncertainty: float
    rule: ForkRule


def entropies_of(node: Node) -> list[float]:
    """The entropy at each token of a node, nats. Raises ValueError for a node that does not carry them."""
    if len(node.entropies) != len(node.tokens):
        raise ValueError(f"node {node.id}: {len(node.entropies)} entropies for {len(node.tokens)} tokens")
    return node.entropies


def most_uncertain(tree: Tree, count: int, *, signal: str, distance: int, borders_only: bool = False) -> list[Fork]:
    """`count` branches at the most uncertain tokens of a tree at rest; rule `rank`.

    `borders_only`: only first tokens of segments. Raises ValueError for a tree without a segment.
    """
    field = _Field(tree, signal, distance, borders_only)
    chosen = [field.take_best() for _ in range(count)]
    forks = []
    # In order of choice; a token that was chosen several times gets as many branches.
    for place in dict.fromkeys(chosen):
        node = int(field.node_of_token[place])
        offset = int(place - field.begin[node])
        forks.append(Fork(node, offset, chosen.count(place), float(field.value[place]), "rank"))
    return forks


class _Field:
    """The tokens of a tree's segments one after another, and how much each is worth as a branch point."""

    def __init__(self, tree: Tree, signal: str, distance: int, borders_only: bool) -> None:
        if len(tree.nodes) == 1:
            raise ValueError(f"prompt {tree.prompt_id!r}: nothing was sampled that could fork")
        self.tree = tree
        self.distance = distance
        lengths = np.array([0, *(len(node.tokens) for node in tree.nodes[1:])], np.int64)
        self.begin: Ints = np.cumsum(lengths) - lengths
        self.end: Ints = self.begin + lengths
        self.node_of_token: Ints = np.repeat(np.arange(len(lengths)), lengths)
        self.value: Floats = np.zeros(int(self.end[-1]))
        # What a value is divided by: the tokens drawn at a place for entropies, else 1; one more with every fork.
        self.draws: Ints = np.ones(len(self.value), np.int64)
        self.open: Bools = np.ones(len(self.value), np.bool_)
        self._weigh(signal)
        if borders_only:
            starts = np.zeros_like(self.open)
            starts[self.begin[1:]] = True
            self.open &= starts
        for node in tree.nodes[1:]:
            # Nobody drew what an environment said. The token after it may fork.
            if node.observation:
                self.open[self.begin[node.id] : self.end[node.id]] = False
        self._close_near_branches()

    def take_best(self) -> int:
        """The token that is worth most, the first of equals; it has one branch more afterwards."""
        worth = np.where(self.open, self.value / self.draws, -1.0)
        best = int(np.flatnonzero(worth >= worth.max() - TIE)[0])
        self.draws[best] += 1
        self._close_around(best)
        return best

    def _weigh(self, signal: str) -> None:
        """Give every place its value, at the first of its tokens, and close the others."""
        follows: dict[tuple[int, int], int] = {}  # (place, token drawn there) -> the place after it
        first_at: dict[int, int] = {0: 0}
        place_after = [0] * len(self.tree.nodes)
        for node in self.tree.nodes[1:]:
            place = place_after[node.parent]
            values = entropies_of(node) if signal == "entropy" else node.logprobs
            for index, (token, value) in enumerate(zip(node.tokens, values, strict=True), int(self.begin[node.id])):
                first = first_at.setdefault(place, index)
                seen = follows.get((place, token))
                if first != index:
                    self.open[index] = False
                if signal == "entropy":
                    self.value[first] = max(0.0, value) if first == index else self.value[first]
                    self.draws[first] += first != index
                elif seen is None:
                    left = 1.0 if first == index else self.value[first]
                    # Rounding: the logprobs of all tokens may add up to a little more than 1.
                    self.value[first] = max(0.0, left - math.exp(value))
                if seen is None:
                    seen = follows[place, token] = len(follows) + 1
                place = seen
            place_after[node.id] = place

    def _close_near_branches(self) -> None:
        """Close what is too near to where paths branch already, above and below."""
        for parent in self.tree.nodes:
            if parent.id != ROOT and len(parent.children) < 2:
                continue
            for child in parent.children:
                self._close_below(child, 1)
            self._close_above(parent.id, len(parent.tokens), 1)

    def _close_around(self, place: int) -> None:
        """Close the tokens too near to a new branch point, but not the point itself."""
        node = int(self.node_of_token[place])
        offset = int(place - self.begin[node])
        self._close_below(node, offset + 1)
        self._close_above(node, offset, 1)

    def _close_below(self, node: int, offset: int) -> None:
        """Close tokens from `offset` of `node` on, down to `distance` from the token before it."""
        reach = [(node, offset, self.distance - 1)]
        while reach:
            node, offset, left = reach.pop()
            start = int(self.begin[node]) + offset
            stop = min(start + left, int(self.end[node]))
            self.open[start:stop] = False
            left -= stop - start
            if left > 0:
                reach += [(child, 0, left) for child in self.tree.nodes[node].children]

    def _close_above(self, node: int, offset: int, away: int) -> None:
        """Close tokens before `offset` of `node` that are less than `distance` from it."""
        while node != ROOT and away < self.distance:
            stop = int(self.begin[node]) + offset
            start = max(int(self.begin[node]), stop - (self.distance - away))
            self.open[start:stop] = False
            away += stop - start
            # An only child of the prompt and a branch point end the stretch: what is above them is closed already.
            node = self.tree.nodes[node].parent
            offset = len(self.tree.nodes[node].tokens)


def first_crossings(
    tree: Tree, width: int, *, threshold: float, factor: int, distance: int, borders_only: bool = False
) -> list[Fork]:
    """The forks that a tree of `width` leaves has by the rule `threshold` and lacks so far; [] when it has them all.

    Paths from the prompt share `width` equally, and so do the branches of a fork: at most `factor`. A path may fork
    `distance` tokens after its start, `borders_only` at first tokens of segments alone.
    """
    forks: list[Fork] = []
    trunks = [child for child in tree.nodes[ROOT].children if tree.nodes[child].fork is None]
    paths = [(trunk, 0, quota) for trunk, quota in zip(trunks, shares(width, len(trunks)), strict=True)]
    while paths:
        start, offset, quota = paths.pop()
        crossing = _crossing(tree, start, offset, threshold, distance, borders_only) if quota > 1 else None
        if crossing is None:
            continue
        node, at = crossing
        old, *new = shares(quota, min(factor, quota))
        paths.append((node, at, old))
        siblings = [
            sibling
            for sibling in tree.nodes[tree.nodes[node].parent].children
            if tree.nodes[sibling].fork == "threshold"
        ]
        if at == 0 and siblings:
            paths += [(sibling, 0, quota) for sibling, quota in zip(siblings, new, strict=True)]
        else:
            forks.append(Fork(node, at, len(new), tree.nodes[node].entropies[at], "threshold"))
    return forks


def shares(total: int, parts: int) -> list[int]:
    """`total` over `parts` as equally as can be, the larger shares first: known before anything is sampled.

    >>> shares(16, 3)
    [6, 5, 5]
    """
    return [total // parts + (part < total % parts) for part in range(parts)]


def _crossing(
    tree: Tree, node: int, offset: int, threshold: float, distance: int, borders_only: bool
) -> tuple[int, int] | None:
    """The first token with an entropy above `threshold`, `distance` or more after token `offset` of `node`."""
    seen = -offset
    while True:
        entropies = entropies_of(tree.nodes[node])
        begin = max(0, distance - seen)
        for at in range(begin, 1 if borders_only else len(entropies)):
            if entropies[at] > threshold:
                return node, at
        seen += len(entropies)
        children = tree.nodes[node].children
        if not children:
            return None
        # The eldest is what the path went on with; its siblings are branches, which have quotas of their own.
        node = children[0]


def open_forks(tree: Tree, forks: Sequence[Fork]) -> Iterator[tuple[int, Fork]]:
    """Cut segments so that every fork has a node to branch from; yields that node's id with each fork, in order.

    The tree is renumbered once, before the first is yielded. The caller adds the branches.
    """
    continuation: dict[tuple[int, int], int] = {}
    # From the back: a cut takes away what comes after it.
    for node, offset in sorted({(fork.node, fork.offset) for fork in forks}, reverse=True):
        continuation[node, offset] = tree.split(node, offset).id if offset else node
    new = tree.renumber()
    for fork in forks:
        yield tree.nodes[new[continuation[fork.node, fork.offset]]].parent, fork


def decisions(tree: Tree, node_id: int) -> list[int]:
    """Where the path to `node_id` left the one before it: (response tokens before, which branch) pairs, flat.

    Unlike `Node.path` it does not change when a segment is cut, so seeds may be named by it. The first pair is the
    trunk's; the root has none.
    """
    named: list[int] = []
    before = 0
    for node in map(tree.nodes.__getitem__, tree.ancestry(node_id)[1:]):
        branch = node.path[-1]
        if branch or node.parent == ROOT:
            named += [before, branch]
        before += len(node.tokens)
    return named


def followers(tree: Tree, node_id: int) -> set[int]:
    """The tokens that were drawn after the prefix of `node_id`, on any path: copies of its path count.

    >>> tree = Tree.start("p", [1])
    >>> for tokens in ([5, 6], [5, 7], [8]):
    ...     tree.add_child(0).tokens = tokens
    >>> first = tree.split(1, 1)
    >>> followers(tree, 1), followers(tree, 0)
    ({6, 7}, {8, 5})
    """
    cursors = [(ROOT, len(tree.prompt_tokens))]
    for token in tree.response(node_id):
        cursors = [(node, at + 1) for node, at in _next_tokens(tree, cursors) if tree.nodes[node].tokens[at] == token]
    return {tree.nodes[node].tokens[at] for node, at in _next_tokens(tree, cursors)}


def weigh_branches(tree: Tree, parent: int) -> None:
    """Set the weights of the children of `parent`, which avoid each other's first tokens, in the order of their draws.

    Each has the probability of its first token, the last one what is left of 1: an unbiased estimate of a mean under
    the policy, given any draws before (Des Raj, 1956).
    """
    children = [tree.nodes[child] for child in tree.nodes[parent].children]
    left = 1.0
    for child in children[:-1]:
        child.weight = min(left, math.exp(child.logprobs[0]))
        left -= child.weight
    children[-1].weight = left


def _next_tokens(tree: Tree, cursors: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(node, place in it) of every token that follows one of the places; a segment that is not there yet has none."""
    for node, at in cursors:
        if at < len(tree.nodes[node].tokens):
            yield node, at
        else:
            yield from ((child, 0) for child in tree.nodes[node].children if tree.nodes[child].tokens)
