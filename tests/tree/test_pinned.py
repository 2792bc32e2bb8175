"""The default sampler (`transfer: level`, `budget: equal`, `fallback_cut: random`) gives the trees it always gave.

The digests were taken from the code before it learnt other rules: a change here means that old runs can no longer
be repeated, which is a decision, not an accident.
"""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from treepo_mega.config import RolloutConfig
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

EOS, COUNTS = 0, ("segments", "generated_tokens", "dropped_tokens", "levels", "fallbacks", "duplicates")


def grow(seed: int, **changes: object) -> Tree:
    """One tree over letters; about every 7th token is EOS."""
    values = {"n_samples_per_prompt": 12, "segment_length": 4, "max_response_len": 20, **changes}
    cfg = RolloutConfig(**values)  # type: ignore[arg-type]
    stop = StopRules.from_config(cfg, [EOS], lambda tokens: "".join(chr(97 + t) for t in tokens))
    search = TreeSearch("p", [7, 8], cfg, seed=seed, stop=stop)
    while not search.done:
        for want in search.wants():
            rng = random.Random(derive_seed(want.seed, *want.prefix))
            tokens = [rng.randrange(7) for _ in range(want.max_tokens)]
            tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
            search.take(want.node_id, Segment(tokens, [-rng.random() for _ in tokens], "length"))
    return search.tree


def digest(trees: list[Tree]) -> str:
    """A hash of all that a tree says, in a form that new fields and counts do not change."""
    told = [
        [
            [[n.id, n.parent, n.path, n.tokens, n.logprobs, n.children, n.stop, n.fallback] for n in tree.nodes],
            tree.leaves,
            tree.shortfall is not None,
            [tree.counts[name] for name in COUNTS],
        ]
        for tree in trees
    ]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=12).hexdigest()


CASES = {
    "defaults": ({}, "700aa4981038acda6c962f61"),
    "fallback any, three branches": ({"fallback": "any", "branch_factor": 3}, "b2af6a7c873c4324d91f5351"),
    "fallback longest": ({"fallback": "longest"}, "700aa4981038acda6c962f61"),
    "fallback none": ({"fallback": "none"}, "8c2e6595076f888e63b1fa52"),
    "drawn first branches": ({"initial_branches": (2, 8), "n_samples_per_prompt": 16}, "775d155d313c78751b2de0b4"),
    "sequential": ({"mode": "sequential"}, "2e4ebe622bf243fb9486039e"),
}


@pytest.mark.parametrize("name", CASES)
def test_old_seeds_give_the_old_trees(name):
    changes, expected = CASES[name]
    trees = [grow(seed, **changes) for seed in range(20)]
    assert any(tree.counts["fallbacks"] or tree.shortfall for tree in trees) or name == "sequential"
    assert digest(trees) == expected
