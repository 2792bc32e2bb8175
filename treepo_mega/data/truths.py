"""Truths at load: as text for the verifiers, and refused with file and line when the verifier cannot grade them."""

from __future__ import annotations

import ast
import json
import logging
import math
from typing import Any

from treepo_mega.config import RewardConfig
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.answers import accepted
from treepo_mega.data.rewards.truths import CHECKED, check_truth, truth_is_settled
from treepo_mega.data.rewards.verifiers import BUILT_IN
from treepo_mega.data.rows import PromptError
from treepo_mega.text.boxes import last_box

logger = logging.getLogger(__name__)

MAX_READ = 2000
"""Formulas of a source that math-verify reads at load (about a millisecond each); the rest it meets when grading."""

MAX_NAMED = 5


MAX_SHORT = 200
"""Characters of an answer; a solution column with a longer text, or several lines, is a worked solution."""

MAX_LIST = 10_000
"""Characters of Python text that are read as a list of accepted answers."""


def truth_text(value: Any, verifier: str, where: str) -> str:
    """The truth as text: GSM8K's `#### 42` cut to 42, a list of accepted answers as a JSON list of texts.

    A user's function gets lists and mappings as JSON, unchanged. Raises PromptError for NaN and infinity.
    """
    if isinstance(value, str):
        if (short := _after_hashes(value)) is not None:
            return short
        value = _list_in(value) if verifier in BUILT_IN else value
        if isinstance(value, str):
            return value
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


def _after_hashes(text: str) -> str | None:
    """What stands behind GSM8K's last `####` when that begins the last line; None for other texts."""
    if "####" not in text:
        return None
    head, _, tail = text.rpartition("####")
    if tail.startswith("#") or "\n" in tail.strip() or (head and not head.endswith("\n")):
        return None
    return tail.strip()


def _list_in(text: str) -> Any:
    """The texts of a Python list of texts, as CSV exports write accepted answers; else `text` itself."""
    if not text.lstrip().startswith("['") or len(text) > MAX_LIST:
        return text
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return found if isinstance(found, list) and found and all(isinstance(one, str) for one in found) else text


def cut_solution(value: Any, verifier: str, where: str, *, is_solution: bool) -> Any:
    r"""A worked solution cut to what its last box holds; an answer cut to its only box; other values as they are.

    Only for verifiers that compare short answers. `is_solution`: the value stands in a column of solutions, and is
    refused when it is long and has no box.
    """
    if not isinstance(value, str) or verifier not in CHECKED or accepted(value) != [value]:
        return value
    if "boxed" in value and (is_solution or value.count("boxed") == 1):
        content = last_box(value)
        if content is not None:
            return content
    short = value.strip()
    if is_solution and ("\n" in short or len(short) > MAX_SHORT) and _after_hashes(value) is None:
        raise PromptError(
            f"{where}: 'solution' is a worked solution without a \\boxed{{}} answer, and no column holds a short "
            f"answer ({short[:60]!r}); set data.label_key to the key that holds it, or leave such rows out"
        )
    return value


class Truths:
    """The truths of a source: each distinct one is looked at once, however often it stands there."""

    def __init__(self, verifier: str, source: str) -> None:
        self._verifier = verifier
        self._source = source
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, where: str, truth: str) -> None:
        """Remember a truth, and the first places where it stands."""
        count = self._counts.get(truth, 0)
        self._counts[truth] = count + 1
        if not count:
            self._places[truth] = [where]
        elif count < MAX_NAMED:
            self._places[truth].append(where)

    def check(self, *, read_formulas: bool = True) -> None:
        """Refuse the source when the verifier cannot grade some of its truths.

        `read_formulas` false: only what needs no worker process with math-verify. Raises PromptError that names the
        first places, the reasons and what to set.
        """
        verifier = self._verifier
        if verifier == "reasoning_gym":  # its truths come from the task, and its scorer does not read them
            return
        reasons = {truth: check_truth(verifier, truth) for truth in self._counts}
        formulas = []
        if read_formulas:
            formulas = [t for t, reason in reasons.items() if reason is None and not truth_is_settled(verifier, t)]
        if len(formulas) > MAX_READ:
            logger.info("%s: math-verify reads %d of %d formulas at load", self._source, MAX_READ, len(formulas))
        if formulas:
            with RewardPool(RewardConfig()) as pool:
                reasons.update(zip(formulas[:MAX_READ], pool.check_math_truths(formulas[:MAX_READ]), strict=True))
        bad = {truth: reason for truth, reason in reasons.items() if reason}
        if not bad:
            return
        count = sum(self._counts[truth] for truth in bad)
        lines = [f"{where}: {reason}" for truth, reason in bad.items() for where in self._places[truth]]
        named = "; ".join(lines[:MAX_NAMED])
        more = f"; and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
        raise PromptError(
            f"{named}{more}. Verifier {verifier!r} cannot grade {count} of {sum(self._counts.values())} truths of "
            f"{self._source}: leave these rows out, or set data.label_key to the key that holds the answer, or "
            "data.verifier to one that suits it (exact compares any text)"
        )
