"""What a verifier returned or raised, as the reply of a worker. Imports the standard library only."""

from __future__ import annotations

import math
import os
import traceback
from typing import Any

MAX_EXTRAS = 32
MAX_TEXT = 500
"""Characters of an error or an extra that are sent back."""

REMOTE_COSTS = ("remote_calls", "remote_retries", "remote_cached")
"""What reward servers cost: requests, those of them that were not the first try, and answers that needed none."""

OWN_METRICS = ("lost", "mean", "overlapped_share", "overlong_penalty", "kl", "kl_penalty", *REMOTE_COSTS)
"""Numbers that a verifier's dict cannot hold, because `reward/<name>` is a metric of the trainer."""


def interpret(value: Any) -> dict[str, Any]:
    """What a verifier returned as `{"score", "extra"}`. Raises TypeError or ValueError for anything else."""
    extra: dict[str, Any] = {}
    if isinstance(value, dict):
        if "score" not in value:
            raise TypeError(f"the verifier returned a dict without 'score' (keys: {', '.join(map(str, value))[:200]})")
        for key in list(value)[:MAX_EXTRAS]:
            if key == "score":
                continue
            if key in OWN_METRICS:
                raise ValueError(f"the verifier's dict holds {key!r}, a metric of the trainer; choose another name")
            kept = _scalar(str(key), value[key])
            if key == "acc" and not isinstance(kept, float):
                raise TypeError(f"the verifier's 'acc' is {type(value[key]).__name__}; expected a number")
            if kept is not None:
                extra[str(key)[:80]] = kept
        value = value["score"]
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"the verifier returned {type(value).__name__}; expected a float or a dict with 'score'")
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the verifier returned {score}; expected a finite score")
    return {"score": score, "extra": extra}


def _scalar(key: str, value: Any) -> float | str | None:
    """A finite number or a short text; None for anything else, which is not sent back.

    Raises ValueError for NaN and infinity: they would spoil the metric `reward/<key>` in silence.
    """
    if isinstance(value, str):
        return value[:MAX_TEXT]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        raise ValueError(f"the verifier returned {number} as {key!r}; expected a finite number")
    return number


def reason_of(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:MAX_TEXT]}{where}"
