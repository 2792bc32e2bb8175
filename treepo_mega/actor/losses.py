"""Losses of packs: the segment-advantage policy loss, and cross entropy for warm starts.

A loss is a sum over a pack's rows. It sees a tile of them at a time, as a pack of only these rows, unless it joins rows
and says so with `needs_whole_packs`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from treepo_mega.config import AlgoConfig
from treepo_mega.errors import TreepoError
from treepo_mega.loss.backend import Backend
from treepo_mega.loss.mismatch import MISMATCH, mismatch_sums
from treepo_mega.loss.policy import clip_active, kl_penalty, policy_loss, supervised_loss
from treepo_mega.loss.stats import Stats
from treepo_mega.runtime.device import device
from treepo_mega.runtime.staging import staged
from treepo_mega.tree.pack import Pack

ROW_TERMS = ("rollout_logprobs", "A_pos", "A_neg", "n", "count")
"""Arrays of a pack that the policy loss takes by these names."""

ROWS = f"{MISMATCH}_rows"
"""Name of the sum that counts the rows of the sum `mismatch`."""


class LossError(TreepoError):
    """A pass that the loss needs did not run."""


class PackLoss(Protocol):
    """(logp [n], entropy [n], pack with these n rows) -> (loss [] summed over them, statistics)."""

    needs_whole_packs: bool
    """Does the loss join rows of a pack? The head then recomputes logits in backward, one product more."""

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        """The loss of the rows of `pack`."""


def on_device(values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A pack's array on this rank's device, in `dtype` if given (packs hold fp64, the loss computes in logp's)."""
    return staged(values, device(), dtype)


class PolicyLoss:
    """The segment-advantage loss (`loss/policy.py`) on packs whose old logprobs are filled in."""

    def __init__(self, algo: AlgoConfig, backend: Backend = "torch") -> None:
        self.algo = algo
        self.needs_whole_packs = algo.ratio_level == "sequence"
        # The kernel's statistics count rows by their loss weight, which is their number of trajectories only here.
        alike = algo.leaf_weight == "uniform" and algo.tree_weight != "prompt"
        counts_rows = algo.loss_agg_mode == "token-mean" and alike
        stated = algo.policy_loss == "ppo" and algo.kl_loss_type != "low_var_kl"
        self.kernel = backend == "triton" and counts_rows and stated

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        """As `PackLoss`. Raises LossError for a pack without old logprobs, or without the reference's for a KL term."""
        if pack.old_logprobs is None and not pack.on_policy:
            raise LossError("the pack has no old logprobs: run actor.logprobs before actor.update")
        old = logp.detach() if pack.old_logprobs is None else on_device(pack.old_logprobs, logp.dtype)
        terms: dict[str, Any] = {name: on_device(getattr(pack, name), logp.dtype) for name in ROW_TERMS}
        terms["old_logprobs"] = old
        terms["ref_logprobs"] = None if pack.ref_logprobs is None else on_device(pack.ref_logprobs, logp.dtype)
        if self.needs_whole_packs:
            total, stats = self._sequence_level(logp, entropy, pack, terms)
        else:
            total, stats = policy_loss(logp, entropy, **terms, algo=self.algo, kernel=self.kernel)
        return total, stats + self._mismatch(logp.detach(), old, pack, terms)

    def _mismatch(self, logp: Tensor, old: Tensor, pack: Pack, terms: dict[str, Any]) -> Stats:
        """How far the engine's logprobs are from the actor's, of the weights that both sampled and were asked with."""
        actor = old if self.algo.old_logprobs != "rollout" else logp
        # With the engine's own as old ones, only the first forward pass knows the actor's.
        known = self.algo.old_logprobs != "rollout" or pack.on_policy
        compared: slice | Tensor = slice(None if known else 0)
        if known and pack.fresh is not None:
            # Places and not a mask: a device would have to be asked how many there are.
            compared = on_device(np.flatnonzero(pack.fresh))
        actor, engine, count = actor[compared], terms["rollout_logprobs"][compared], terms["count"][compared]
        apart = (actor - engine).abs()
        zero = logp.new_zeros(())
        sums = {MISMATCH: apart.sum(), ROWS: zero + apart.numel()}
        sums |= mismatch_sums(actor, engine, count, on_device(pack.depth)[compared])
        return Stats(sums, {"max_mismatch": apart.max() if apart.numel() else zero})

    def _sequence_level(self, logp: Tensor, entropy: Tensor, pack: Pack, terms: dict[str, Any]) -> tuple[Tensor, Stats]:
        """GSPO on a flat pack, which holds trajectories whole: each token has its trajectory's geometric mean ratio.

        The KL term stays per token. Source: Zheng et al., "Group Sequence Policy Optimization" (2025), eq. 5-7.
        """
        algo = self.algo
        _, trajectory_of_row, sizes = np.unique(pack.trajectory, return_inverse=True, return_counts=True)
        which = on_device(trajectory_of_row)
        length = on_device(sizes, logp.dtype)
        change = logp.new_zeros(len(sizes)).index_add(0, which, logp - terms["old_logprobs"]) / length
        # The value of the mean, the gradient of the token's own logprob: importance weights then multiply token by
        # token. Weighed alike, the two gradients of a trajectory are the same.
        mean = logp + (terms["old_logprobs"] + change[which] - logp).detach()
        # The mean ratio must not enter the KL term: it is added here, per token.
        total, stats = policy_loss(mean, entropy, **terms, algo=algo, with_kl=False)
        if algo.kl_loss_coef > 0:
            if terms["ref_logprobs"] is None:
                raise LossError("algo.kl_loss_coef > 0 needs reference logprobs: the reference pass did not run")
            kl = (terms["n"] * kl_penalty(logp, terms["ref_logprobs"], algo.kl_loss_type)).sum()
            total = total + algo.kl_loss_coef * kl
            stats.sums |= {"kl_loss": kl.detach(), "loss": total.detach()}
        return total, stats


class SupervisedLoss:
    """Cross entropy of a pack's targets, for warm starts."""

    needs_whole_packs = False

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        """As `PackLoss`."""
        return supervised_loss(logp, on_device(pack.n, logp.dtype))


def clip_gates(algo: AlgoConfig, pack: Pack, logp: Tensor, old: Tensor | None, rows: Tensor) -> Tensor:
    """Closed clip gates [n] of some rows of a pack, against `old` logprobs [n] or the pack's own."""
    A_pos, A_neg = (on_device(values, logp.dtype)[rows] for values in (pack.A_pos, pack.A_neg))
    if old is None:
        if pack.old_logprobs is None:
            return torch.zeros_like(A_pos, dtype=torch.bool)
        old = on_device(pack.old_logprobs, logp.dtype)[rows]
    return clip_active((logp - old).exp(), A_pos, A_neg, algo)
