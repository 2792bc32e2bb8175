"""Which truths a verifier can grade, asked when prompts are loaded, so that no sample is lost for it later.

    check_truth("math", "proof")    -> "'proof' stands for a missing answer"
    check_truth("math", "42")       -> None
    truth_is_settled("math", "x^2") -> False: math-verify has to read it (`RewardPool.check` asks it in a worker)

Only the standard library is needed: workers and the loader both import this.
"""

from __future__ import annotations

from treepo_mega.data.rewards.answers import accepted, as_number, is_settled, plain
from treepo_mega.data.tasks.countdown import parse_truth

SENTINELS = frozenset(
    {
        *("proof", "see proof", "see solution", "see explanation", "notfound", "not found", "answer not found"),
        *("n/a", "n.a", "none", "null", "nil", "no answer", "noanswer", "no answer provided", "not provided"),
        *("not available", "unavailable", "unknown", "missing", "tbd", "todo", "placeholder"),
        *("?", "??", "???", "-", "--", "---", "\u2013", "\u2014", "...", "\u2026", "_", "<na>", "[]", "{}"),
    }
)
"""Texts that data sets write where there is no answer; lower case, without outer white space and period."""

NON_FINITE = frozenset({"nan", "inf", "infinity"})

CHECKED = ("math", "boxed", "last_number", "countdown")
"""Built-in verifiers whose truths must say something. `exact` compares any text, a user's function decides itself."""


def check_truth(verifier: str, ground_truth: str) -> str | None:
    """Why built-in `verifier` cannot grade against this truth, or None. Cheap, in process, nothing is evaluated."""
    if not all(truth.strip() for truth in accepted(ground_truth)):
        return "the truth, or one of the accepted answers, is blank"
    if verifier not in CHECKED:
        return None
    for truth in accepted(ground_truth):
        if (reason := _check_one(verifier, truth)) is not None:
            return reason
    return None


def _check_one(verifier: str, truth: str) -> str | None:
    short = truth.strip()
    if verifier == "countdown":
        try:
            parse_truth(short)
        except ValueError as error:
            return str(error)
        return None
    named = plain(short).casefold()
    if named.lstrip("+-") in NON_FINITE:
        return f"{short[:80]!r} is not a finite number (infinity as an answer is written \\infty)"
    if short.casefold() in SENTINELS or named in SENTINELS or not named:
        return f"{short[:80]!r} stands for a missing answer"
    if verifier == "last_number" and (as_number(short) is None or "/" in short or "frac" in short):
        return f"last_number: the ground truth {short[:80]!r} is not an integer or a decimal"
    return None


def truth_is_settled(verifier: str, ground_truth: str) -> bool:
    """Whether `check_truth` is the whole check, because no mathematics needs to be read."""
    if verifier != "math":
        return True
    return all(is_settled(truth) for truth in accepted(ground_truth))
