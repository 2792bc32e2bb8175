"""Trees of a step without a model: deterministic, with branches, ends and repeated tokens as samplers make them.

    tree = synthetic_tree(number)                # graded, 16 leaves of about 4,000 tokens each
    tree = synthetic_tree(number, Shape(leaves=4, response=64, segment=16))

Paths branch by two at each border until there are as many as leaves, and end at lengths around the mean. Half of the
branches repeat the beginning of an elder sibling, as those of a sure policy do. A function of number and shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from treepo_mega.rollout.counts import PREFIX_COUNTS
from treepo_mega.tree.node import Tree

VOCABULARY = 150_000
KINDS_OF_END = ("eos", "eos", "answer", "length")


@dataclass(frozen=True)
class Shape:
    """What a tree looks like; lengths in tokens."""

    leaves: int = 16
    response: int = 4096
    """Mean length of a response."""
    segment: int = 512
    prompt: int = 200


def synthetic_tree(number: int, shape: Shape | None = None) -> Tree:
    """The graded tree of prompt `number`."""
    shape = shape or Shape()
    draw = np.random.default_rng((17, number))
    tree = Tree.start(f"prompt-{number}", draw.integers(0, VOCABULARY, shape.prompt).tolist())
    paths = [(0, 0)]  # (node, response tokens up to its end)
    ends: list[int] = []
    while paths:
        growing = []
        for node, length in paths:
            branches = 2 if len(paths) + len(growing) + len(ends) < shape.leaves else 1
            elder: list[int] = []
            for _ in range(branches):
                child = tree.add_child(node)
                size = int(draw.integers(shape.segment // 2, shape.segment + 1))
                tokens = draw.integers(0, VOCABULARY, size)
                common = int(draw.integers(0, size)) if elder and draw.random() < 0.5 else 0
                common = min(common, len(elder))
                tokens[:common] = elder[:common]
                child.tokens = tokens.tolist()
                child.logprobs = (-draw.random(size, np.float32)).tolist()
                elder = elder or child.tokens
                ended = length + size >= shape.response * (0.5 + draw.random())
                if ended:
                    child.stop = KINDS_OF_END[int(draw.integers(len(KINDS_OF_END)))]
                    ends.append(child.id)
                else:
                    growing.append((child.id, length + size))
        paths = growing
    tree.leaves = ends
    tree.renumber()
    tree.rewards = draw.integers(0, 2, len(ends)).astype(float).tolist()
    tree.verdicts = list(tree.rewards)
    tree.counts = dict.fromkeys(("generated_tokens", "dropped_tokens", *PREFIX_COUNTS), float(tree.unique_tokens()))
    return tree
