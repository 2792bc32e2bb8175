"""Which prompts a step begins: continuous refill, whose outcome depends on the prompts alone. Pure bookkeeping.

    rule = RefillRule(begin=16, wanted=16, most=176)
    rule.replaces(3)        # the third tree without signal: the position of the prompt that begins in its place

Prompts begin in cursor order, `begin` of them at once. `need(B)` trees with signal suffice once B prompts have begun:
`wanted`, fewer where the step's leaves run out, 0 where no more may begin. It never grows with B. Whenever a tree ends
without signal, the next prompt begins if too few are found or in flight.

Theorem: the begun prefix is the smallest B >= `begin` whose first B prompts hold `need(B)` trees with signal.

Proof. Let the prompts before position B have begun, k of them without signal so far. B - k are found or in flight, so
B begins as soon as B - k < need(B), that is k >= t(B) with t(B) = B + 1 - need(B). t grows with B by 1 at least: each k
reaches t for one position at most (`replaces`), and positions begin in order. All that begins ends. So B begins exactly
if the first B prompts end with fewer than need(B) with signal. No order of ends, engine or grader enters. QED.

Whether a tree has signal follows from its prompt and the step's seeds (`teaching.py`): so does the prefix.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

from treepo_mega.rollout.adaptive import LeafBudget
from treepo_mega.rollout.jobs import Job

if TYPE_CHECKING:
    from treepo_mega.data.cursor import PromptCursor

NoSignal = Callable[[dict[str, Any]], bool]
"""Whether the row of a graded tree says that it has no signal."""


@dataclass(frozen=True, slots=True)
class RefillRule:
    """See the module docstring. `begin`: prompts that begin at once; `wanted`: trees with signal; `most`: prompts."""

    begin: int
    wanted: int
    most: int
    leaves: LeafBudget | None = None
    """Where leaves are dealt out by what handfuls say: fewer trees with signal may suffice."""
    empty: int = 0
    """Trees without signal of this step that ended before the run was killed (`durable.py`)."""

    def need(self, begun: int) -> int:
        """Trees with signal that suffice once `begun` prompts have begun; it never grows with them."""
        if begun >= self.most:
            return 0
        return self.wanted if self.leaves is None else self.leaves.need(begun, self.wanted)

    def threshold(self, position: int) -> int:
        """Trees without signal after which the prompt at `position`, from `begin` on, begins.

        >>> [RefillRule(begin=6, wanted=4, most=9).threshold(position) for position in (6, 7, 8)]
        [3, 4, 5]
        """
        return position + 1 - self.need(position)

    def replaces(self, empty: int) -> int | None:
        """The position that begins because a tree ended as the `empty`-th without signal; None: none does.

        >>> rule = RefillRule(begin=6, wanted=4, most=8)
        >>> [rule.replaces(empty) for empty in (1, 2, 3, 4, 5)]
        [None, None, 6, 7, None]
        """
        empty += self.empty
        place = bisect.bisect_left(range(self.begin, self.most), empty, key=self.threshold)
        position = self.begin + place
        return position if position < self.most and self.threshold(position) == empty else None

    def resumed(self, without_signal: Mapping[int, bool]) -> tuple[RefillRule, int]:
        """The rule of a step that goes on, and how many prompts had begun.

        `without_signal`: of the positions that ended before the kill, whether they have none. One beyond what had
        begun by their account is not counted: it will have begun once the others have ended again.

        >>> rule, begun = RefillRule(begin=4, wanted=4, most=9).resumed({0: True, 4: True, 6: True})
        >>> begun, rule.empty, rule.replaces(1)
        (6, 2, 6)
        """
        begun = self.begin
        empty = 0
        while (now := sum(no for position, no in without_signal.items() if position < begun)) > empty:
            for count in range(empty + 1, now + 1):
                begun += self.replaces(count) is not None
            empty = now
        return replace(self, empty=self.empty + empty), begun

    @property
    def may_replace(self) -> bool:
        """Whether any tree without signal could be replaced."""
        return self.begin < self.most and self.threshold(self.begin) <= self.begin


class Supply(Sequence[Job]):
    """The jobs of a step: those that begin at once, and behind them what the cursor would hand out next.

    Every rank that asks for a position gets the same job, and none moves the cursor. `len` and iteration are over the
    jobs that were asked for. `leaves`: of a new prompt's tree (`Job.leaves`).
    """

    def __init__(self, begin: Sequence[Job], ahead: PromptCursor | None, leaves: int | None = None) -> None:
        """`ahead`: a cursor of its own that stands behind the prompts of `begin`; None: nothing more begins."""
        self._jobs = list(begin)
        self._ahead = ahead
        self._leaves = leaves

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs))

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Job]: ...
    def __getitem__(self, index: int | slice) -> Job | Sequence[Job]:
        """The job at a position; those before it that nobody has asked for yet are drawn with it."""
        if isinstance(index, int) and self._ahead is not None and index >= len(self._jobs):
            more = self._ahead.take(index + 1 - len(self._jobs))
            self._jobs += [Job(prompt, leaves=self._leaves) for prompt in more]
        return self._jobs[index]
