"""The registry of verifiers: functions that grade one answer.

A verifier has verl's signature, `compute_score(data_source, solution_str, ground_truth, extra_info=None)`,
and returns a float or a dict with "score" (other scalar entries are kept as extras). Built in:

    math           equal in mathematics: the last box, else the last <answer>, else the text, all behind </think>
    boxed          the text in the last closed box equals the truth: without spaces, or as a number
    last_number    the last number in the text equals the truth
    exact          the text behind </think> equals the truth, but for white space around it
    countdown      the last attempt meets the target of a truth like 3,8,5,2>29 by right steps (tasks/countdown.py)
    reasoning_gym  the task's own score_answer on the last box, else on <answer>...</answer>, else on the text
    environment    what get_reward of the trajectory's environment says (rollout/turns.py asks it, not this module)

and `path/to/file.py:function` for a user's own, which may be async, and `http:NAME` for a server of `reward.servers`
(remote.py). Each is imported only when it is first asked for, in the
worker (math-verify and reasoning-gym take seconds); this module itself imports the standard library only.
docs/grading.md says which candidate counts; a truth that is a JSON list of texts accepts any of them.

Trap. reasoning-gym gives small partial credit for any text, hence the threshold at 1. Its entries hold tuples, which
JSON turns into lists and some scorers then misjudge: the entry is made again from (name, params, seed, index), and
its question compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from treepo_mega.data.rewards.answers import accepted, after_thinking, as_number, find_answer, plain
from treepo_mega.data.rewards.truths import check_truth
from treepo_mega.data.tasks.countdown import parse_truth, solves
from treepo_mega.errors import TreepoError, nearest
from treepo_mega.runtime.user_code import (
    UserCodeError,
    check_defined,
    check_parameters,
    import_function,
    is_written_async,
    parameters_of,
)
from treepo_mega.text.boxes import last_box
from treepo_mega.text.function_path import FORM, is_function_path
from treepo_mega.text.reward_name import REWARD
from treepo_mega.text.server_name import FORM as SERVER_FORM
from treepo_mega.text.server_name import server_of

Verifier = Callable[..., Any]

PARAMETERS = ("data_source", "solution_str", "ground_truth", "extra_info")
OPTIONAL_PARAMETERS = ("trajectory", "prompt")
"""What a verifier is called with, by name (`plugins/contracts.py: Reward`)."""

Kind = Literal["batch", "async", "http"]
"""By what a verifier is run: `worker.py` one answer after the other, or `flights.py` many at a time."""

BUILT_IN = ("math", "boxed", "last_number", "exact", "countdown", "reasoning_gym", REWARD)

# A sign behind a digit, a letter or a closing bracket is an operator: the last number of `5-3` is 3.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


class VerifierError(TreepoError):
    """A verifier that cannot be used: unknown name, missing file or function, failing import."""


def exact(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the answer is the truth, or one of the accepted ones, but for white space around it."""
    answer = after_thinking(solution_str).strip()
    return float(answer in {truth.strip() for truth in (ground_truth, *accepted(ground_truth))})


def boxed(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the last closed box holds the truth: the same text without white space, or the same number.

    Dollars, a trailing period and `\\text{}` do not count as text. Raises ValueError for a truth that says nothing.
    """
    if reason := check_truth("boxed", ground_truth):
        raise ValueError(f"boxed: the ground truth cannot be graded: {reason}")
    content = last_box(solution_str)
    if content is None:
        return 0.0
    return float(any(_same_text_or_number(content, truth) for truth in accepted(ground_truth)))


def _same_text_or_number(content: str, truth: str) -> bool:
    if "".join(plain(content).split()) == "".join(plain(truth).split()):
        return True
    number = as_number(truth)
    return number is not None and as_number(content) == number


def last_number(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the last number in the text equals the truth. Raises ValueError when the truth is no plain number."""
    if reason := check_truth("last_number", ground_truth):
        raise ValueError(reason)
    numbers = _NUMBER.findall(solution_str.replace("\u2212", "-"))
    found = as_number(numbers[-1]) if numbers else None
    return float(found is not None and any(as_number(truth) == found for truth in accepted(ground_truth)))


def countdown(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the last attempt behind </think> meets the target, by any right way; ValueError for another truth."""
    if reason := check_truth("countdown", ground_truth):
        raise ValueError(reason)
    answer = after_thinking(solution_str)
    return float(any(solves(answer, *parse_truth(truth)) for truth in accepted(ground_truth)))


def _load_math() -> Verifier:
    from treepo_mega.data.rewards.mathematics import compute_score

    # The grammar is built on first use (0.3 s and more). Outside a main thread SIGALRM cannot be set and every
    # answer would look wrong. sqrt makes sure that math-verify is asked, not our own rules.
    if compute_score("", "\\boxed{\\sqrt{12}}", "2\\sqrt{3}")["score"] != 1.0:
        raise VerifierError("math: math-verify does not find sqrt(12) equal to 2 sqrt(3); it needs a main thread")
    return compute_score


def _load_reasoning_gym() -> Verifier:
    import reasoning_gym

    @lru_cache(maxsize=64)
    def dataset(name: str, params: str, seed: int, size: int) -> Any:
        return reasoning_gym.create_dataset(name, **json.loads(params), seed=seed, size=size)

    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
    ) -> dict[str, float]:
        """The task's own score_answer, thresholded at full marks, on the last box, <answer> or the whole text."""
        try:
            ref = extra_info["reasoning_gym"]
            task = dataset(ref["name"], json.dumps(ref["params"], sort_keys=True), ref["seed"], ref["size"])
            index, question = ref["index"], extra_info["entry"]["question"]
        except (KeyError, TypeError):
            raise ValueError(
                "reasoning_gym: the prompt has no reference to its task in extra_info['reasoning_gym']; this "
                "verifier grades prompts of data sources with a reasoning_gym key only"
            ) from None
        # Not extra_info's own entry: JSON made lists of its tuples, and some scorers then misjudge.
        entry = task[index]
        if entry["question"] != question:
            raise ValueError(f"reasoning_gym: item {index} of {ref['name']} is not the prompt's question any more")
        answer = find_answer(solution_str).text.strip()
        raw = float(task.score_answer(answer, entry))
        # reasoning-gym gives a little credit for any text: only full marks are right.
        return {"score": float(raw >= 1.0), "raw_score": raw}

    return compute_score


def check_verifier(name: str) -> None:
    """Raise VerifierError unless `name` is built in, a server or a function that its file defines (nothing is run).

    The message names what is known, and the nearest name. `config/rules.py` knows which servers there are.
    """
    if name in BUILT_IN or server_of(name) is not None:
        return
    if not is_function_path(name):
        known = f"{', '.join(BUILT_IN)}, {SERVER_FORM} or {FORM}"
        raise VerifierError(f"unknown verifier {name!r}{nearest(name, BUILT_IN)}: expected {known}")
    what = f"verifier {name!r}"
    try:
        # Parsed, not imported: the trainer and the preflight call this, and a user's file runs in workers only.
        written = check_defined(name, what, may_be_async=True)
        if written is not None:
            check_parameters(written, PARAMETERS, OPTIONAL_PARAMETERS, what)
    except UserCodeError as error:
        raise VerifierError(str(error)) from None


def kind_of(name: str) -> Kind:
    """What runs a verifier that `check_verifier` lets through; of a user's file its text says it."""
    if server_of(name) is not None:
        return "http"
    return "async" if is_function_path(name) and is_written_async(name, f"verifier {name!r}") else "batch"


def load_verifier(name: str) -> Verifier:
    """Import what verifier `name`, no server, needs and return its function. Runs the user's file: workers only.

    Raises VerifierError for an unknown name, and whatever the user's file raises while it is imported.
    """
    check_verifier(name)
    if name == "math":
        return _load_math()
    if name == "reasoning_gym":
        return _load_reasoning_gym()
    if name == REWARD:
        raise VerifierError(f"{REWARD}: its reward is asked where its state is, never of a grader")
    if name in BUILT_IN:
        return {"boxed": boxed, "last_number": last_number, "exact": exact, "countdown": countdown}[name]
    what = f"verifier {name!r}"
    try:
        function = import_function(name, what, asynchronous=kind_of(name) == "async")
        check_parameters(parameters_of(function), PARAMETERS, OPTIONAL_PARAMETERS, what)
    except UserCodeError as error:
        # The cause is what the file raised; the pool says whose it is.
        raise error.__cause__ or VerifierError(str(error)) from None
    return function
