"""Random graded trees for tests, and what they mean: one trajectory at a time, by the definition."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st

from treepo_mega.tree.node import ROOT, Node, Tree


def grow(
    rng: random.Random,
    *,
    nodes: int,
    max_segment: int,
    prompt: int,
    name: str,
    ids: itertools.count,
    observed: float = 0.0,
    hides: float = 0.0,
) -> Tree:
    """A tree of `nodes` segments (0 to `max_segment` tokens) below a prompt; every end of a path is a leaf.

    `observed`: chance that a segment is answered by an observation, below which the tree goes on. `hides`: chance that
    it hides some of what came before, and restates it.
    """
    tree = Tree.start(name, [next(ids) for _ in range(prompt)])
    for _ in range(nodes):
        # Newer nodes are likelier parents: deep trees and wide ones.
        up = max(rng.randrange(len(tree.nodes)) for _ in range(rng.choice((1, 3))))
        node = tree.add_child(up)
        size = rng.choice((0, 1, max_segment, rng.randint(0, max_segment)))
        node.tokens = [next(ids) for _ in range(size)]
        node.logprobs = [-t / 1000 for t in node.tokens]
        # An answer of the world ends no path and begins none: it has one above and gets children below.
        if observed and node.tokens and rng.random() < observed:
            said = [next(ids) for _ in range(rng.randint(1, max_segment))]
            rewrites = rng.random() < hides
            hidden = rng.randrange(len(tree.prefix(node.id))) if rewrites else 0
            tree.observe(node.id, said, hidden=hidden, restated=rng.randrange(len(said)) if rewrites else 0)
    for node in [n for n in tree.nodes if n.observation and not n.children]:
        last = tree.add_child(node.id)
        last.tokens = [next(ids) for _ in range(rng.randint(0, max_segment))]
        last.logprobs = [-t / 1000 for t in last.tokens]
    tree.leaves = [n.id for n in tree.nodes if not n.children and n.id != ROOT]
    tree.rewards = [rng.choice((-1.0, 0.0, 0.5, 1.0)) for _ in tree.leaves]
    return tree


@st.composite
def forests(draw, max_trees: int = 4, max_nodes: int = 14, max_segment: int = 6) -> list[Tree]:
    """Trees whose token ids are unique over the forest, so that a token can be found again."""
    rng, ids = random.Random(draw(st.integers(0, 1 << 30))), itertools.count(1)
    observed, hides = draw(st.sampled_from(((0.0, 0.0), (0.4, 0.0), (0.4, 0.5), (0.7, 1.0))))
    trees = [
        grow(
            rng, nodes=draw(st.integers(1, max_nodes)), max_segment=max_segment, prompt=draw(st.integers(1, 5)),
            name=f"p{i}", ids=ids, observed=observed, hides=hides,
        )
        for i in range(draw(st.integers(1, max_trees)))
    ]  # fmt: skip
    if draw(st.booleans()):  # a lost reward leaves nodes without a leaf
        tree = rng.choice(trees)
        if len(tree.leaves) > 1:
            gone = rng.randrange(len(tree.leaves))
            del tree.leaves[gone], tree.rewards[gone]
    return trees


def is_sampled(node: Node) -> bool:
    """Whether the policy sampled it: neither the prompt nor an observation."""
    return node.parent >= 0 and not node.observation


def spoken(tree: Tree, leaf: int) -> list[tuple[list[int], int]]:
    """(what its policy saw, token) of every sampled token of a trajectory, in order."""
    out = []
    for node in (tree.nodes[each] for each in tree.ancestry(leaf) if is_sampled(tree.nodes[each])):
        path = tree.prefix(node.id)
        begin = len(path) - len(node.tokens)
        out += [(path[: begin + index], token) for index, token in enumerate(node.tokens)]
    return out


def contexts(tree: Tree, leaf: int) -> list[list[int]]:
    """What a trajectory's tokens see, in as few sequences as can be: one, and one more where history is rewritten."""
    path = [tree.nodes[each] for each in tree.ancestry(leaf)]
    return [*(tree.prefix(node.parent) for node in path if node.hidden), tree.prefix(leaf)]


def full_path(tree: Tree, leaf: int) -> list[int]:
    """Prompt and response of one trajectory."""
    return tree.prefix(leaf)
