"""Truths at load: as text for the verifiers, and refused with file and line when the verifier cannot grade them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from treepo_mega.config import RewardConfig
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.truths import check_truth, truth_is_settled
from treepo_mega.data.rewards.verifiers import BUILT_IN
from treepo_mega.data.rows import PromptError

logger = logging.getLogger(__name__)

MAX_READ = 2000
"""Formulas of a source that math-verify reads at load (about a millisecond each); the rest it meets when grading."""

MAX_NAMED = 5


def truth_text(value: Any, verifier: str, where: str) -> str:
    """The truth as text: GSM8K's `#### 42` cut to 42, a list of accepted answers as a JSON list of texts.

    A user's function gets lists and mappings as JSON, unchanged. Raises PromptError for NaN and infinity.
    """
    if isinstance(value, str):
        head, mark, tail = value.rpartition("\n#### ")
        return tail.strip() if mark and head and "\n" not in tail.strip() else value
    scalars = isinstance(value, list) and all(isinstance(v, str | int | float) for v in value)
    for number in value if scalars else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise PromptError(
                f"{where}: the truth is {number}, which no answer can equal; expected a finite number or a text "
                "(data.label_key says which key holds it)"
            )
    if scalars and verifier in BUILT_IN:
        value = [v if isinstance(v, str) else json.dumps(v) for v in value]
    return json.dumps(value, ensure_ascii=False)


def check_truths(truths: Sequence[tuple[str, str]], verifier: str, source: str) -> None:
    """Refuse a source whose (where, truth) pairs `verifier` cannot grade. Each distinct truth is looked at once.

    Raises PromptError that names the first places, the reasons and what to set.
    """
    if verifier == "reasoning_gym":  # its truths come from the task, and its scorer does not read them
        return
    reasons = {truth: check_truth(verifier, truth) for truth in dict.fromkeys(truth for _, truth in truths)}
    formulas = [t for t, reason in reasons.items() if reason is None and not truth_is_settled(verifier, t)]
    if len(formulas) > MAX_READ:
        logger.info("%s: math-verify reads %d of %d formulas at load", source, MAX_READ, len(formulas))
    if formulas:
        with RewardPool(RewardConfig()) as pool:
            reasons.update(zip(formulas[:MAX_READ], pool.check_math_truths(formulas[:MAX_READ]), strict=True))
    bad = [(where, reasons[truth]) for where, truth in truths if reasons[truth]]
    if not bad:
        return
    named = "; ".join(f"{where}: {reason}" for where, reason in bad[:MAX_NAMED])
    more = f"; and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    raise PromptError(
        f"{named}{more}. Verifier {verifier!r} cannot grade {len(bad)} of {len(truths)} truths of {source}: leave "
        "these rows out, or set data.label_key to the key that holds the answer, or data.verifier to one that suits it "
        "(exact compares any text)"
    )
