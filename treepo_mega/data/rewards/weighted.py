"""A reward of several functions (`reward.functions`): each answer goes to all of them, and their scores are weighed.

    items = expand(items, functions)                 # one for each answer and function
    results = combine(pool.score(items), functions)  # one for each answer again

The first function says whether the answer is right: its number `acc`, else its score, is the verdict, and evaluation
looks at it alone. Each score is logged as `reward/<name>`, the further numbers of a function as `reward/<name>.<key>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from treepo_mega.data.rewards.items import RewardItem, RewardResult
from treepo_mega.data.rewards.returned import OWN_METRICS
from treepo_mega.data.rewards.truths import check_truth
from treepo_mega.data.rewards.verifiers import BUILT_IN, VerifierError, check_verifier

if TYPE_CHECKING:
    from treepo_mega.config import RewardFunction
    from treepo_mega.data.prompts import Prompt

VERDICT = "acc"
"""The number of a verifier's dict that says whether the answer is right."""


def used_functions(functions: Sequence[RewardFunction], purpose: str) -> list[RewardFunction]:
    """Those that grade: all; in evaluation ("eval") the first alone, unweighted: it says whether answers are right."""
    return [part.model_copy(update={"weight": 1.0}) for part in functions[:1]] if purpose == "eval" else list(functions)


def expand(items: Sequence[RewardItem], functions: Sequence[RewardFunction]) -> list[RewardItem]:
    """Every item once for each function, in their order; the items themselves without functions."""
    if not functions:
        return list(items)
    return [replace(item, verifier=part.verifier or item.verifier) for item in items for part in functions]


def combine(results: Sequence[RewardResult], functions: Sequence[RewardFunction]) -> list[RewardResult]:
    """One result of each `len(functions)` that follow one another; an answer that one function lost is lost."""
    if not functions:
        return list(results)
    each = len(functions)
    return [_sum(results[first : first + each], functions) for first in range(0, len(results), each)]


def _sum(parts: Sequence[RewardResult], functions: Sequence[RewardFunction]) -> RewardResult:
    scores = []
    extra: dict[str, float | str] = {}
    for part, function in zip(parts, functions, strict=True):
        if part.score is None:
            return RewardResult(None, f"{function.label}: {part.error}")
        scores.append(function.weight * part.score)
        extra[function.label] = part.score
        extra |= {f"{function.label}.{key}": value for key, value in part.extra.items()}
    return RewardResult(math.fsum(scores), None, {VERDICT: parts[0].extra.get(VERDICT, parts[0].score)} | extra)


def check_functions(functions: Sequence[RewardFunction]) -> list[str]:
    """The problems of `reward.functions`, as sentences: unknown functions, names that stand twice, no weight at all."""
    bad = []
    taken = {*OWN_METRICS, VERDICT}
    seen: dict[str, int] = {}
    for index, function in enumerate(functions):
        key = f"reward.functions.{index}"
        if function.verifier is not None:
            try:
                check_verifier(function.verifier)
            except VerifierError as error:
                bad.append(f"{key}: {error}")
        if function.label in taken:
            bad.append(f"{key}: reward/{function.label} is a metric of the trainer; set {key}.name to another")
        elif function.label in seen:
            bad.append(
                f"{key}: {function.label!r} is the name of reward.functions.{seen[function.label]} too; set {key}.name"
            )
        seen.setdefault(function.label, index)
    if functions and not any(function.weight for function in functions):
        bad.append("reward.functions: every weight is 0, so that all rewards are equal")
    return bad


def check_truths(functions: Sequence[RewardFunction], prompts: Iterable[Prompt]) -> None:
    """Raise VerifierError for the first truth that a built-in function beside the prompt's own cannot grade."""
    built_in = [(index, each.verifier) for index, each in enumerate(functions) if each.verifier in BUILT_IN]
    for prompt in prompts if built_in else ():
        for index, verifier in built_in:
            reason = None if verifier is None or verifier == prompt.verifier else check_truth(verifier, prompt.answer)
            if reason:
                raise VerifierError(
                    f"reward.functions.{index}: verifier {verifier!r} cannot grade prompt {prompt.id!r}: {reason}; "
                    "choose one that suits the truths, or leave such rows out"
                )
