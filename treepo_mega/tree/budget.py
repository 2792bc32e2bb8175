"""How many children the living paths of a level get: TreePO's branching budget transfer.

At the end of a level a tree has A living paths, F finished ones (f of them finished in this level) and may
have w leaves in all. With branch factor N the level's budget is (paper section 2.2, "budget transfer")

    total = max(A, min(w - F, N * (A + f)))

so the branches of paths that stopped go to their living siblings, and a tree never promises more than w leaves.

`budget: equal` splits the total equally. The other budgets weigh a path by its *local* certainty x (nats):

    the mean logprob of its newest segment's tokens          low_prob and high_prob, signal: segment
    the logprob of the likeliest next token at its end       low_prob and high_prob, signal: branch_point
    minus the entropy of the k likeliest next tokens there   entropy

The first is what the paper calls the last tokens when fallback is aligned to segments (section 4.4). The others look
at the distribution that the children's first tokens are drawn from. Weights are softmax(-+ (x - min x) / temperature),
- for low_prob and entropy, + for high_prob: the first two favour paths the model is unsure of.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from treepo_mega.config import RolloutConfig
from treepo_mega.tree.node import Node


def level_budget(active: int, finished: int, just_finished: int, width: int, branch_factor: int) -> int:
    """Children to make after a level: `active` = A, `finished` = F (with this level's), `just_finished` = f.

    Raises ValueError when the paths alive and finished are already more than `width`.
    """
    if active + finished > width:
        raise ValueError(f"{active} living + {finished} finished paths exceed the width {width}")
    # By induction active <= width - finished: no living path is dropped and no leaf is too many.
    return max(active, min(width - finished, branch_factor * (active + just_finished)))


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


def split_by_certainty(total: int, living: Sequence[Node], rollout: RolloutConfig) -> list[int]:
    """`total` children (or leaves) over living nodes, in their order, for every budget but `equal`."""
    certainties = [certainty(node, rollout) for node in living]
    favour_low = rollout.branching.budget.kind != "high_prob"
    return split_by_weight(
        total, softmax_weights(certainties, rollout.branching.budget.temperature, favour_low=favour_low)
    )
