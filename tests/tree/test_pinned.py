"""The default sampler (`transfer: level`, `budget: equal`, `fallback_cut: random`) gives the trees it always gave.

The digests were taken from the code before it learnt other rules: a change here means that old runs can no longer
be repeated, which is a decision, not an accident.
"""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from tests.rollouts import rollout_config
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

EOS, COUNTS = 0, ("segments", "generated_tokens", "dropped_tokens", "levels", "fallbacks", "duplicates")


def grow(seed: int, **changes: object) -> Tree:
    """One tree over letters; every third token is EOS."""
    values = {"segment__length": 2, "max_response_len": 12, "n_samples_per_prompt": 12, **changes}
    cfg = rollout_config(**values)
    stop = StopRules.from_config(cfg, [EOS], lambda tokens: "".join(chr(97 + t) for t in tokens))
    search = TreeSearch("p", [7, 8], cfg, seed=seed, stop=stop)
    while not search.done:
        for want in search.wants():
            rng = random.Random(derive_seed(want.seed, *want.prefix))
            tokens = [rng.randrange(3) for _ in range(want.max_tokens)]
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
    "short of depth": ({"n_samples_per_prompt": 30, "max_response_len": 6}, "429aae7ba3d3ebda624d6e5b"),
    "defaults": ({}, "cec3d1deff82a5dcb1bc2b08"),
    "fallback any, three branches": ({"fallback__from": "any", "branching__factor": 3}, "6f55c584b6eed1f3b5a86a35"),
    "fallback longest": (
        {"fallback__from": "longest", "n_samples_per_prompt": 30, "max_response_len": 6},
        "4be316c958be4127f4962fc2",
    ),
    "fallback none": ({"fallback__from": "none"}, "36efd26a3b6d03807b494eff"),
    "drawn first branches": ({"branching__initial": (2, 8), "n_samples_per_prompt": 16}, "f4f9d8a7e206a594b1554f79"),
    "sequential": ({"mode": "sequential"}, "7409dcdc67b71a7a571aec9d"),
}


@pytest.mark.parametrize("name", CASES)
def test_old_seeds_give_the_old_trees(name):
    changes, expected = CASES[name]
    trees = [grow(seed, **changes) for seed in range(40)]
    short_of_leaves = sum(bool(tree.counts["fallbacks"] or tree.shortfall) for tree in trees)
    assert short_of_leaves >= 3 or name == "sequential"
    assert digest(trees) == expected
