"""KL in the reward: what a leaf loses for its distance from the reference policy. Pure NumPy.

    sums = gather_kl(packs, len(segments))            # of this rank's rows; summed over ranks by the caller
    kl = segments.leaf_sums(sums)                     # [L] nats
    charge(trees, kl, reward.kl_coef)                 # before advantages

The KL of a leaf is the sum over the tokens of its path of log pi_old - log pi_ref (the estimator k1), so leaves that
share a prefix share its part. It is exact on trees: each token's number is computed once and reaches every leaf below.
E[R - coef KL] is then what the policy gradient climbs, without a term beside the advantages: the gradient of the k1
sum's own logprobs has mean 0. k2 and k3 have no such property, and are for `algo.kl_loss_type`.

As verl's `use_kl_in_reward` and OpenRLHF's `kl_coef` (Ziegler et al., 2019), for rewards at the end of a response.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Pack
from treepo_mega.tree.segments import Floats


def gather_kl(packs: Sequence[Pack], segments: int) -> Floats:
    """[S] sum of log pi_old - log pi_ref over the rows of `packs` by segment, nats.

    Packs without logprobs (other pipeline stages) have nothing to say. Raises ValueError for a pack with one of them.
    """
    sums = np.zeros(segments)
    for pack in packs:
        # Taken for another stage's, such a pack would count as a KL of 0.
        if (pack.old_logprobs is None) != (pack.ref_logprobs is None):
            raise ValueError("a pack has old or reference logprobs alone: the KL of its rewards needs both passes")
        if pack.old_logprobs is not None and pack.ref_logprobs is not None:
            change = pack.old_logprobs.astype(np.float64) - pack.ref_logprobs
            sums += np.bincount(pack.segment, change, segments)
    return sums


def charge(trees: Sequence[Tree], kl: Floats, coef: float) -> None:
    """Take `coef` times `kl` [L], in the order of `trees` and their leaves, off the rewards.

    >>> tree = Tree.start("p", [1])
    >>> tree.leaves = [tree.add_child(0).id, tree.add_child(0).id]
    >>> tree.rewards = [1.0, 0.0]
    >>> charge([tree], np.array([2.0, -1.0]), 0.1)
    >>> tree.rewards
    [0.8, 0.1]
    """
    # fp64 all the way: rewards are compared for equality elsewhere.
    charged = iter((coef * kl).tolist())
    for tree in trees:
        tree.rewards = [reward - next(charged) for reward in tree.rewards]
