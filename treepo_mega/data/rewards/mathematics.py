r"""The `math` verifier: our own rules first (`answers.settle`), then math-verify. Imported in workers only.

Traps. (1) math-verify reads two boxes as a set, so that `\boxed{41} ... \boxed{42}` is wrong for 42: one candidate is
handed over. (2) It evaluates: `\boxed{6*7}` counts as 42. Where restating the question would score (plain
arithmetic), use `boxed` or `last_number`. (3) Its time limits are SIGALRM, in whole seconds and in the main thread
only, and default to 5 s twice; both are set here. An answer that hits one scores 0 and carries `timed_out: 1`, because
an answer that cannot be read in that time is a wrong answer; a *truth* that cannot be read raises. (4) It multiplies
the letters of a word, so that silent equals listen, and reads 1.2e3 as 1.2 times e times 3: `settle` and `tidy` come
before it for these.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from treepo_mega.data.rewards.answers import Answer, accepted, find_answer, settle, tidy
from treepo_mega.data.rewards.truths import check_truth, truth_is_settled
from treepo_mega.text.boxes import last_box

MATH_TIMEOUT_S = 2
"""math-verify's limit for parsing, and again for comparing; whole seconds."""


@lru_cache(maxsize=4096)
def _truths(ground_truth: str) -> tuple[tuple[str, list[Any]], ...]:
    """(text, what math-verify parsed) of each accepted answer. Raises ValueError for a truth without meaning."""
    if reason := check_truth("math", ground_truth):
        raise ValueError(f"math: the ground truth cannot be graded: {reason}")
    out = []
    for truth in accepted(ground_truth):
        text = last_box(truth) or truth
        parsed = parse(f"\\boxed{{{tidy(text)}}}", parsing_timeout=MATH_TIMEOUT_S)
        # math-verify keeps text that it cannot read as it stands; as a truth that would match nothing.
        if not truth_is_settled("math", text) and not any(not isinstance(p, str) for p in parsed):
            raise ValueError(f"math: the ground truth {truth[:80]!r} cannot be parsed")
        out.append((text, parsed))
    return tuple(out)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, float]:
    """1 when the response's answer equals an accepted one; 0 when it times out or cannot be read, which flags say."""
    truths = _truths(ground_truth)
    answer = find_answer(solution_str)
    verdicts = [settle(text, answer) for text, _ in truths]
    if any(verdicts):
        return _scored(1.0)
    left = [parsed for (_, parsed), verdict in zip(truths, verdicts, strict=True) if verdict is None]
    return _by_mathematics(left, answer) if left else _scored(0.0)


def _by_mathematics(truths: list[list[Any]], answer: Answer) -> dict[str, float]:
    text = answer.text if answer.mark == "none" else f"\\boxed{{{tidy(answer.text)}}}"
    try:
        # By default both calls log a timeout and return [] or False: a wrong answer without a flag.
        found = parse(text, parsing_timeout=MATH_TIMEOUT_S, raise_on_error=True)
        right = any(verify(truth, found, timeout_seconds=MATH_TIMEOUT_S, raise_on_error=True) for truth in truths)
    # It derives from BaseException in math-verify 0.9: `except Exception` below would not catch it.
    except TimeoutException:
        return _scored(0.0, timed_out=1.0)
    # The worker has to see this one: it answers it by asking to be replaced.
    except MemoryError:
        raise
    except Exception:
        # Parsers raise all manner of things on text that is not mathematics; such an answer is wrong.
        return _scored(0.0, unparsable=1.0)
    return _scored(float(right))


def _scored(score: float, *, timed_out: float = 0.0, unparsable: float = 0.0) -> dict[str, float]:
    """The flags stand in every result: their means are metrics."""
    return {"score": score, "timed_out": timed_out, "unparsable": unparsable}
