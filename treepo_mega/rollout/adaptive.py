"""Leaves where there is signal: how the leaves of a step are dealt to its prompts. Pure bookkeeping.

    budget = LeafBudget.of(cfg.rollout)              # rollout_batch_size x n_samples_per_prompt leaves
    count = budget.begin(wanted, mixed)              # prompts that begin now, each with a handful of leaves
    shares = budget.share(mixed)                     # leaves more for each prompt whose rewards differ, in cursor order

A handful of equal rewards settles a prompt: it gets no more. New prompts begin while the step holds more leaves than
the mixed ones may take. Everything follows from rewards in cursor order, so it is the same on every rank and for every
order in which trees were finished.
"""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mega.config import RolloutConfig


@dataclass(slots=True)
class LeafBudget:
    """The leaves of one step. `first`: of a handful; `most`: of one tree; `left`: not asked for yet."""

    first: int
    most: int
    left: int

    @classmethod
    def of(cls, rollout: RolloutConfig) -> LeafBudget:
        """The whole budget of a step."""
        total = rollout.rollout_batch_size * rollout.n_samples_per_prompt
        return cls(rollout.first_leaves, rollout.leaves_at_most, total)

    def begin(self, wanted: int, mixed: int) -> int:
        """How many of `wanted` prompts begin, while `mixed` wait for more leaves; their handfuls are taken off.

        >>> budget = LeafBudget(first=4, most=16, left=100)
        >>> budget.begin(10, 0), budget.left
        (10, 60)
        >>> budget.begin(7, 3), budget.left
        (7, 32)
        >>> budget.begin(4, 6)
        0
        """
        # What the mixed ones may take is better spent on them than on prompts of which nothing is known.
        count = 0 if self.left <= mixed * (self.most - self.first) else min(wanted, self.left // self.first)
        self.left -= count * self.first
        return count

    def share(self, mixed: int) -> list[int]:
        """Leaves more for each of `mixed` prompts: all that is left, equally, the earlier ones first; taken off.

        >>> LeafBudget(first=4, most=16, left=32).share(3), LeafBudget(first=4, most=8, left=32).share(3)
        ([11, 11, 10], [4, 4, 4])
        """
        base, odd = divmod(self.left, max(1, mixed))
        shares = [min(self.most - self.first, base + (place < odd)) for place in range(mixed)]
        self.left -= sum(shares)
        return shares
