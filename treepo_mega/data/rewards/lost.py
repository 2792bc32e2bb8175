"""Lost rewards: counted where they are graded, told once a step, and an error when nothing else is left.

    report_lost(pool.take_tally(), "step 7")     # collective over all ranks

A lost sample was neither right nor wrong: its verifier raised, hung or died. It leaves its tree, so a few cost a
little data and are a metric (reward/lost). Many are a warning on rank 0. When all are lost a step would train on
nothing, which is an error on every rank.
"""

from __future__ import annotations

import logging

from treepo_mega.data.rewards.items import Tally
from treepo_mega.errors import TreepoError
from treepo_mega.runtime import dist
from treepo_mega.text.server_name import server_of

logger = logging.getLogger(__name__)

MANY = 0.05
"""Share of a step's rewards from which losses are a warning."""


class RewardsLostError(TreepoError):
    """No reward of a step could be graded; the message names the verifier, its first reason and what to set."""


def describe_lost(tallies: list[Tally], when: str) -> tuple[int, int, str]:
    """(lost, graded or lost, message) over the tallies of all ranks."""
    total = sum(tally["total"] for tally in tallies)
    lost: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for tally in tallies:
        for verifier, count in tally["lost"].items():
            lost[verifier] = lost.get(verifier, 0) + count
            reasons.setdefault(verifier, tally["reasons"][verifier])
    told = "; ".join(f"verifier {name!r} lost {lost[name]}, first: {reasons[name]}" for name in sorted(lost))
    count = sum(lost.values())
    advice = "See docs/grading.md. Set data.verifier or data.label_key if the truths do not suit the verifier, "
    advice += "reward.timeout_s if gradings take too long, reward.memory_mb if they need more memory"
    if any(server_of(name) is not None for name in lost):
        advice = (
            "See docs/guides/remote-rewards.md: timeout_s, retries and deadline_s of reward.servers bound an answer"
        )
    return count, total, f"{when}: {count} of {total} rewards were lost: {told}. {advice}"


def report_lost(tally: Tally, when: str, *, fatal: bool = True) -> None:
    """Warn on rank 0 when more than MANY of the rewards were lost. Collective over all ranks.

    Raises RewardsLostError on every rank when all were lost and `fatal`.
    """
    lost, total, message = describe_lost(dist.gather_objects(tally), when)
    # All ranks hold the same tallies and raise together. One alone would leave the others in their next collective.
    if lost and lost == total and fatal:
        raise RewardsLostError(message)
    if lost > MANY * total and dist.rank() == 0:
        logger.warning("%s", message)
