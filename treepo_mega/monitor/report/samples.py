"""What a run wrote, by step: the best and the worst leaf of a prompt, for the report.

Of each step only the first trees are read, up to one whose rewards differ: a file may hold hundreds of megabytes.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from treepo_mega.data.light_tokenizer import LightTokenizer
from treepo_mega.monitor.completions import (
    BRANCH,
    PROMPT_CHARACTERS,
    RESPONSE_CHARACTERS,
    choose,
    credit,
    marked_pieces,
    printable,
    shorten,
)
from treepo_mega.monitor.tree_page.read import Settings, find_tokenizer, steps_with_trees, trees_path
from treepo_mega.tree.node import Tree

STEPS = 8
"""Steps that are shown at most: the first, the last, and others evenly between them."""
TREES_LOOKED_AT = 16


@dataclass(frozen=True)
class Sample:
    """One leaf. Texts are of one line, shortened, without control characters; they are not escaped."""

    step: int
    prompt: str
    response: str
    reward: float
    advantage: str


@dataclass(frozen=True)
class Samples:
    """Leaves by step; `notes` say what could not be read."""

    leaves: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_samples(run_dir: Path) -> Samples:
    """The best and the worst leaf of some steps of a run; nothing where the run has written no trees."""
    steps = steps_with_trees(run_dir)
    if not steps:
        return Samples()
    notes: list[str] = []
    tokenizer = find_tokenizer(run_dir, Settings.read(run_dir / "config.yaml", notes), notes)
    leaves = []
    for step in spread(steps, STEPS):
        path = trees_path(run_dir, step)
        try:
            leaves += _of_step(step, path, tokenizer)
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"{path.name}: cannot be read: {error}")
    return Samples(leaves, notes)


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items: the first, the last, and others evenly between them.

    >>> spread([1, 20, 40, 60, 80], 3), spread([1, 20], 3)
    ([1, 40, 80], [1, 20])
    """
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _of_step(step: int, path: Path, tokenizer: LightTokenizer | None) -> list[Sample]:
    trees: list[Tree] = []
    with path.open(encoding="utf-8") as file:
        for line in itertools.islice(file, TREES_LOOKED_AT):
            trees.append(Tree.from_dict(json.loads(line)))
            if len(set(trees[-1].rewards)) > 1:
                break

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))

    found = []
    for tree, index in choose(trees, 2):
        pieces = marked_pieces(tree, tree.leaves[index], decode)
        response = "".join((BRANCH if branches else "") + printable(piece) for branches, piece in pieces)
        found.append(
            Sample(
                step,
                shorten(printable(decode(tree.prompt_tokens)), PROMPT_CHARACTERS),
                shorten(response, RESPONSE_CHARACTERS),
                tree.rewards[index],
                credit(tree, index),
            )
        )
    return found
