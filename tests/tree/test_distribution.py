"""A tree's leaves are distributed as independent samples are: exact arithmetic and chi-square on a tiny model.

The model has three tokens (one of them EOS), depends on the last two tokens, and answers at most four, so that every
response and its probability can be written down. What holds, for every budget and transfer rule without fallback:

- A *random descent* (from the root, a child drawn uniformly at each node) ends in a response with exactly the model's
  probability, because a node's number of children is fixed before any of them is sampled. Equivalently a leaf
  weighted by the product of 1 / (number of children) along its path.
- When no path can end early, any leaf chosen without looking at its tokens does, for `budget: equal`.

What does *not* hold, and is tested so that nobody believes it: with early ends a uniformly drawn leaf is not such a
sample. A path that ended is one leaf, a path that goes on becomes several, so long responses are over-represented.
Seeds are fixed: the tests are deterministic; the thresholds are far quantiles of chi-square (p about 1e-4).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter

import pytest

from tests.rollouts import rollout_config
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.stop import StopRules

EOS, LENGTH, TREES = 0, 4, 2500
Response = tuple[int, ...]
RULES = [(t, b) for t in ("level", "quota") for b in ("equal", "low_prob", "high_prob")]


def next_token(response: Response, eos: float) -> list[float]:
    """The model: probabilities of tokens 0 (EOS), 1, 2 after a response."""
    lean = 0.3 + 0.15 * (sum(response[-2:]) % 4)
    return [eos, (1 - eos) * lean, (1 - eos) * (1 - lean)]


def exact(eos: float) -> dict[Response, float]:
    """Every response and its probability, by enumeration."""
    ended: dict[Response, float] = {}
    for n in range(1, LENGTH + 1):
        for response in itertools.product(range(3), repeat=n):
            if EOS in response[:-1] or (n < LENGTH and response[-1] != EOS):
                continue
            p = math.prod(next_token(response[:i], eos)[t] for i, t in enumerate(response))
            ended |= {response: p} if p > 0 else {}
    return ended


def grow(seed: int, eos: float, **changes: object) -> Tree:
    values = {"n_samples_per_prompt": 6, "segment__length": 1, "max_response_len": LENGTH, "fallback__from": "none"}
    cfg = rollout_config(**{**values, "branching__factor": 2, "branching__budget__temperature": 0.2, **changes})
    stop = StopRules.from_config(cfg, [EOS], lambda tokens: "".join(map(str, tokens)))
    search = TreeSearch("p", [9], cfg, seed=seed, stop=stop)
    while not search.done:
        for want in search.wants():
            rng, tokens, logprobs = random.Random(want.seed), want.prefix[1:], []
            for _ in range(want.max_tokens):
                weights = next_token(tuple(tokens), eos)
                tokens.append(rng.choices(range(3), weights)[0])
                logprobs.append(math.log(weights[tokens[-1]]))
                if tokens[-1] == EOS:
                    break
            search.take(want.node_id, Segment(tokens[-len(logprobs) :], logprobs, "stop"))
    return search.tree


@functools.lru_cache
def forest(transfer: str, budget: str, eos: float) -> list[Tree]:
    """Trees of one rule, grown once for all tests."""
    return [grow(seed, eos, branching__transfer=transfer, branching__budget__kind=budget) for seed in range(TREES)]


def descend(tree: Tree, rng: random.Random) -> Response:
    """The response at the end of a walk that draws a child uniformly at every node."""
    node = tree.nodes[ROOT]
    while node.children:
        node = tree.nodes[rng.choice(node.children)]
    return tuple(tree.response(node.id))


def chi_square(seen: Counter[Response], expected: dict[Response, float]) -> tuple[float, float]:
    """Pearson's statistic, and its quantile at p about 1e-4 (Wilson and Hilferty's approximation)."""
    n, df = sum(seen.values()), len(expected) - 1
    assert set(seen) <= set(expected), "a response that the model cannot give"
    assert n * min(expected.values()) > 5, "too few samples for the statistic"
    value = sum((seen[r] - n * p) ** 2 / (n * p) for r, p in expected.items())
    return value, df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


def test_the_enumeration_is_a_distribution():
    assert math.isclose(math.fsum(exact(0.25).values()), 1.0) and len(exact(0.25)) == 1 + 2 + 4 + 8 * 3
    assert math.isclose(math.fsum(exact(0.0).values()), 1.0) and len(exact(0.0)) == 16


@pytest.mark.parametrize(
    "transfer, budget", [RULES[0], *(pytest.param(*rule, marks=pytest.mark.slow) for rule in RULES[1:])]
)
def test_a_random_descent_is_an_independent_sample(transfer, budget):
    rng = random.Random(5)
    seen = Counter(descend(tree, rng) for tree in forest(transfer, budget, 0.25))
    value, limit = chi_square(seen, exact(0.25))
    assert value < limit


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["level", "quota"])
@pytest.mark.parametrize("which", [0, 3, -1])
def test_without_early_ends_every_leaf_is_an_independent_sample(transfer, which):
    """Leaves in path order, so that the choice of one does not look at its tokens."""
    trees = forest(transfer, "equal", 0.0)
    seen = Counter(tuple(t.response(sorted(t.leaves, key=lambda i: t.nodes[i].path)[which])) for t in trees)
    value, limit = chi_square(seen, exact(0.0))
    assert value < limit


@pytest.mark.parametrize("transfer", ["level", pytest.param("quota", marks=pytest.mark.slow)])
def test_a_uniform_leaf_favours_long_responses_where_paths_end_early(transfer):
    rng = random.Random(6)
    seen = Counter(tuple(t.response(rng.choice(t.leaves))) for t in forest(transfer, "equal", 0.25))
    value, limit = chi_square(seen, exact(0.25))
    assert value > 1.5 * limit
    assert seen[(EOS,)] / TREES < 0.9 * 0.25


def test_sequential_leaves_are_independent_samples_and_the_statistic_would_see_a_bias():
    leaves = Counter(
        tuple(t.response(i)) for s in range(1000) for t in [grow(s, 0.25, mode="sequential")] for i in t.leaves
    )
    value, limit = chi_square(leaves, exact(0.25))
    assert value < limit
    value, limit = chi_square(leaves, exact(0.22))
    assert value > limit
