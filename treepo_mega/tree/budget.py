"""How many children the living paths of a level get: TreePO's branching budget transfer.

At the end of a level a tree has A living paths, F finished ones (f of them finished in this level) and may
have w leaves in all. With branch factor N the level's budget is (paper section 2.2, "budget transfer")

    total = max(A, min(w - F, N * (A + f) + kept))

so the branches of paths that stopped go to their living siblings, and a tree never promises more than w leaves.
`kept`: branches that earlier levels did not use, because no border of theirs reached `budget.floor`.

`budget: equal` splits the total equally. The other budgets weigh a path by its *local* certainty x (nats):

    the mean logprob of its newest segment's tokens          low_prob and high_prob, signal: segment
    the logprob of the likeliest next token at its end       low_prob and high_prob, signal: branch_point
    minus the entropy of the k likeliest next tokens there   entropy

The first is what the paper calls the last tokens when fallback is aligned to segments (section 4.4). The others look
at the distribution that the children's first tokens are drawn from. `standings` and `budget_weights` say how
`budget.scale` makes weights of them.

Right after an observation a path may ask for another number of children than N (`branching.after_observation`). The
level's budget adds up what its paths ask for. What a path gets beyond its one child is in proportion to what it asks
for beyond one, times its weight.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence

from treepo_mega.config import RolloutConfig
from treepo_mega.config.rollout import BudgetConfig
from treepo_mega.tree.node import Node


def level_budget(active: int, finished: int, just_finished: int, width: int, branch_factor: int, kept: int = 0) -> int:
    """Children to make after a level: `active` = A, `finished` = F (with this level's), `just_finished` = f.

    Raises ValueError when the paths alive and finished are already more than `width`.
    """
    if active + finished > width:
        raise ValueError(f"{active} living + {finished} finished paths exceed the width {width}")
    # By induction active <= width - finished: no living path is dropped and no leaf is too many.
    return max(active, min(width - finished, branch_factor * (active + just_finished) + kept))


def split_equally(total: int, paths: int, rng: random.Random) -> list[int]:
    """`total` children over `paths` paths, at least one each, differing by at most one.

    The paths must come in path order: then `rng` makes the same choice whatever order segments arrived in.
    Raises ValueError when `total < paths`.
    """
    if total < paths:
        raise ValueError(f"{total} children cannot give each of {paths} paths one")
    base, extra = divmod(total, paths) if paths else (0, 0)
    # Drawn by the tree's own generator: a fixed choice would favour paths for their position.
    lucky = set(rng.sample(range(paths), extra))
    return [base + (i in lucky) for i in range(paths)]


def split_by_width(total: int, widths: Sequence[int], rng: random.Random) -> list[int]:
    """`total` children over paths that ask for `widths`: one each, the rest in proportion to what each asks beyond one.

    Paths that all ask for the same are split equally. They come in path order; `rng` decides between equals.

    >>> split_by_width(6, [1, 4, 1], random.Random(0)), split_by_width(8, [1, 4, 1], random.Random(0))
    ([1, 4, 1], [1, 6, 1])
    """
    if len(set(widths)) <= 1:
        return split_equally(total, len(widths), rng)
    order = rng.sample(range(len(widths)), len(widths))
    equal = [1 / len(widths)] * len(widths)
    shares = split_by_weight(total, beyond_one(equal, [widths[index] for index in order]))
    return [shares[order.index(index)] for index in range(len(widths))]


def beyond_one(weights: Sequence[float], widths: Sequence[int] | None) -> list[float]:
    """`weights` (sum 1) times what each path asks for beyond one child, sum 1; as they are where all ask for the same.

    >>> beyond_one([0.5, 0.5], [2, 4]), beyond_one([0.25, 0.75], [3, 3])
    ([0.25, 0.75], [0.25, 0.75])
    """
    if widths is None or len(set(widths)) <= 1:
        return list(weights)
    asked = [weight * (width - 1) for weight, width in zip(weights, widths, strict=True)]
    total = math.fsum(asked)
    # A path that asks for more may have weight 0.
    return [value / total for value in asked] if total > 0 else list(weights)


def mean_logprob(logprobs: Sequence[float]) -> float:
    """The local certainty x of a segment: mean over its tokens, nats. Raises ValueError for no tokens."""
    if not logprobs:
        raise ValueError("a segment without tokens has no mean logprob")
    return math.fsum(logprobs) / len(logprobs)


def softmax_weights(certainty: Sequence[float], temperature: float, *, favour_low: bool) -> list[float]:
    """softmax(-+ (x - min x) / temperature), - when `favour_low`; positive as far as floats reach, sum 1."""
    sign = -1.0 if favour_low else 1.0
    scaled = [sign * value / temperature for value in certainty]
    # softmax does not see a shift: this one, unlike min x, cannot overflow.
    top = max(scaled)
    raw = [math.exp(exponent - top) for exponent in scaled]
    total = math.fsum(raw)
    return [part / total for part in raw]


def split_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """`total` children over paths: one each, the rest in proportion to `weights` (sum 1) by largest remainder.

    Ties go to the earlier path. Raises ValueError when `total < len(weights)`.
    """
    if total < len(weights):
        raise ValueError(f"{total} children cannot give each of {len(weights)} paths one")
    shares = [(total - len(weights)) * weight for weight in weights]
    whole = [math.floor(share) for share in shares]
    left = total - len(weights) - sum(whole)
    # Rounded, so that equal weights tie although their products differ in the last bit.
    order = sorted(range(len(weights)), key=lambda i: (round(whole[i] - shares[i], 12), i))
    for i in order[:left]:
        whole[i] += 1
    return [1 + extra_children for extra_children in whole]


def top_k_entropy(logprobs: Sequence[float]) -> float:
    """Entropy (nats) of the distribution over the k tokens with these logprobs, renormalised to sum 1.

    Raises ValueError for no logprobs.
    """
    if not logprobs:
        raise ValueError("the entropy at a branch point needs the logprobs of the likeliest next tokens, got none")
    top = max(logprobs)
    weights = [math.exp(logprob - top) for logprob in logprobs]
    total = math.fsum(weights)
    return (
        math.log(total)
        - math.fsum(weight * (logprob - top) for weight, logprob in zip(weights, logprobs, strict=True)) / total
    )


def certainty(node: Node, rollout: RolloutConfig) -> float:
    """The x of the module docstring for a living node, by the kind and the signal of `rollout.branching.budget`."""
    if rollout.branching.budget.kind == "entropy":
        return -top_k_entropy(node.peek)
    if rollout.branching.budget.signal == "branch_point":
        return max(node.peek)
    return mean_logprob(node.logprobs)


def standings(certainties: Sequence[float], budget: BudgetConfig) -> list[float]:
    """How much each path is favoured beside the others, in the unit of `budget.scale`; monotone in the certainty.

    The budget looks at v: the uncertainty -x, or for high_prob the certainty x (nats).

    nats: v itself. share: v as a multiple of its mean (high_prob: exp(v), a probability); 1 for all where the mean is
    0. rank: the place of v, lowest first, divided by the number of paths; equals share their highest place.
    zscore: (v - mean) / standard deviation (of these paths); 0 for all where they are equal.
    """
    sign = 1.0 if budget.kind == "high_prob" else -1.0
    values = [sign * value for value in certainties]
    scale = budget.scale_used
    if scale == "nats":
        return values
    if scale == "rank":
        places = sorted(values)
        # The highest of equals: somebody always has the place 1.0, the most that a floor may ask for.
        return [bisect_right(places, v) / len(values) for v in values]
    if scale == "share":
        # An entropy of 0 may be a rounding error below 0.
        shown = [math.exp(v) if budget.kind == "high_prob" else max(0.0, v) for v in values]
        mean = math.fsum(shown) / len(shown)
        return [v / mean for v in shown] if mean > 0 else [1.0] * len(shown)
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    # Relative to the values: a deviation of rounding errors must not become a z-score.
    if deviation <= 1e-9 * max(1.0, *map(abs, values)):
        return [0.0] * len(values)
    return [(v - mean) / deviation for v in values]


def budget_weights(certainties: Sequence[float], budget: BudgetConfig) -> list[float]:
    """Weights of paths with these certainties (nats), sum 1: what split_by_weight divides by.

    nats: the paper's softmax(-+ (x - min x) / temperature), + for high_prob. zscore: softmax(z / temperature).
    share and rank: the standings themselves, without a temperature.
    """
    if budget.scale_used == "nats":
        return softmax_weights(certainties, budget.temperature, favour_low=budget.kind != "high_prob")
    favour = standings(certainties, budget)
    if budget.scale_used == "zscore":
        return softmax_weights(favour, budget.temperature, favour_low=False)
    total = math.fsum(favour)
    return [value / total for value in favour]


def reach_floor(certainties: Sequence[float], budget: BudgetConfig) -> list[bool]:
    """Whether each path branches at all: its standing is at least `budget.floor`."""
    if budget.floor is None:
        return [True] * len(certainties)
    # A mean of equal values may be a rounding error above them.
    return [value >= budget.floor - 1e-9 for value in standings(certainties, budget)]


Split = Callable[[int, Sequence[Node], RolloutConfig], list[int]]
"""A plug-in that says who gets how many of a total, in the place of certainties."""


def split_by_certainty(
    total: int, living: Sequence[Node], rollout: RolloutConfig, widths: Sequence[int] | None = None
) -> list[int]:
    """`total` leaves or children over living nodes, in their order, at least one each, for every budget but `equal`.

    `widths`: how many children each asks for; None: all the same.
    """
    weights = budget_weights(_certainties(living, rollout), rollout.branching.budget)
    return split_by_weight(total, beyond_one(weights, widths))


def children_by_certainty(
    total: int, living: Sequence[Node], rollout: RolloutConfig, widths: Sequence[int] | None = None
) -> list[int]:
    """Children of living nodes, in their order: `split_by_certainty` over those that reach the floor, one for the rest.

    They are `total` together, or one each where no node reaches the floor.
    """
    budget = rollout.branching.budget
    certainties = _certainties(living, rollout)
    branches = reach_floor(certainties, budget)
    chosen = [index for index, does in enumerate(branches) if does]
    children = [1] * len(living)
    if chosen:
        weights = budget_weights(certainties, budget)
        # Above 0: the highest weight is among the chosen, because weights and standings rise together.
        sum_of_chosen = math.fsum(weights[index] for index in chosen)
        of_chosen = [weights[index] / sum_of_chosen for index in chosen]
        asked = None if widths is None else [widths[index] for index in chosen]
        held = len(living) - len(chosen)
        shares = split_by_weight(total - held, beyond_one(of_chosen, asked))
        for index, share in zip(chosen, shares, strict=True):
            children[index] = share
    return children


def divergence(shares: Sequence[int], total: int) -> float:
    """How far `shares` of `total` branches are from an equal split: total variation distance, 0 to 1.

    What is missing from `total` was kept for later. Which paths an equal split gives one more is nobody's merit, so
    the nearest equal split is meant: 0.0 exactly for what `split_equally` returns.

    >>> divergence([2, 3, 2], 7), divergence([3, 1], 4), divergence([1, 1], 4)
    (0.0, 0.25, 0.5)
    """
    base, extra = divmod(total, len(shares))
    equal = [base + (place < extra) for place in range(len(shares))]
    kept = total - sum(shares)
    apart = sum(abs(share - fair) for share, fair in zip(sorted(shares, reverse=True), equal, strict=True))
    return (apart + kept) / (2 * total)


def count_decision(counts: dict[str, float], shares: Sequence[int], total: int) -> None:
    """Add an allocation of `total` branches to the tree's `budget_decisions` and `budget_divergence` (a sum).

    Nothing is added where nothing was to decide: one branch a path, or one path that took all.
    """
    if total == len(shares) or (len(shares) == 1 and shares[0] == total):
        return
    counts["budget_decisions"] += 1
    # A multiple of 2**-20: under quota decisions come in any order, and such numbers add up to the same sum in each.
    counts["budget_divergence"] += round(divergence(shares, total) * 2**20) / 2**20


def _certainties(living: Sequence[Node], rollout: RolloutConfig) -> list[float]:
    return [certainty(node, rollout) for node in living]
