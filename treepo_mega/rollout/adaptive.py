"""Leaves where there is signal: how the leaves of a step are dealt to its prompts. Pure bookkeeping.

    budget = LeafBudget.of(cfg.rollout)              # rollout_batch_size x n_samples_per_prompt leaves
    budget.need(begun, wanted)                       # prompts whose rewards differ that suffice: then no more begin
    budget.begin(begun)                              # that many prompts have got a handful of leaves each
    shares = budget.share(mixed)                     # leaves more for each prompt whose rewards differ, in cursor order

A handful of equal rewards settles a prompt: it gets no more, and the next prompt begins at once, while the step holds
more leaves than the mixed ones may take. Whether it does is a function of the prefix of prompts that have begun
(`refill.py`), so it is the same on every rank and for every order in which trees end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treepo_mega.config import RolloutConfig
from treepo_mega.rollout.jobs import Job, leaves_of


@dataclass(slots=True)
class LeafBudget:
    """The leaves of one step. `first`: of a handful; `most`: of one tree; `left`: not asked for yet.

    `whole`: mixed prompts whose trees have all the leaves that they are to have.
    """

    first: int
    most: int
    left: int
    whole: int = 0

    @classmethod
    def of(cls, rollout: RolloutConfig, goes_on: Sequence[Job] = ()) -> LeafBudget:
        """The budget of a step that goes on with carried-over trees, each of which keeps the leaves that it was given.

        A handful is taken off by `begin`; what a tree has beyond it is taken off here.
        """
        total = rollout.rollout_batch_size * rollout.n_samples_per_prompt
        first = rollout.first_leaves
        beyond = sum(leaves_of(job, rollout) - first for job in goes_on)
        whole = sum(leaves_of(job, rollout) > first for job in goes_on)
        return cls(first, rollout.leaves_at_most, total - beyond, whole)

    def need(self, begun: int, wanted: int) -> int:
        """Mixed prompts that suffice once `begun` have begun: `wanted`, or those that may take all that is then left.

        It never grows with `begun`. 0: no leaves are left for another handful. For a budget that is still whole.

        >>> budget = LeafBudget(first=4, most=16, left=100)
        >>> [budget.need(begun, 10) for begun in (10, 16, 20, 24, 25)]
        [5, 3, 2, 1, 0]
        """
        left = self.left - begun * self.first
        if left < self.first:
            return 0
        more = self.most - self.first
        # What the mixed ones may take is better spent on them than on prompts of which nothing is known.
        return min(wanted, self.whole - (-left // more)) if more else wanted

    def begin(self, begun: int) -> None:
        """The handfuls of `begun` prompts are taken off."""
        # Trees that several steps have carried over may hold more than a step has.
        self.left = max(0, self.left - begun * self.first)

    def share(self, mixed: int) -> list[int]:
        """Leaves more for each of `mixed` prompts: all that is left, equally, the earlier ones first; taken off.

        >>> LeafBudget(first=4, most=16, left=32).share(3), LeafBudget(first=4, most=8, left=32).share(3)
        ([11, 11, 10], [4, 4, 4])
        """
        base, odd = divmod(self.left, max(1, mixed))
        shares = [min(self.most - self.first, base + (place < odd)) for place in range(mixed)]
        self.left -= sum(shares)
        return shares
