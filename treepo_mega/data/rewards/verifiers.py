"""The registry of verifiers: functions that grade one answer.

A verifier has verl's signature, `compute_score(data_source, solution_str, ground_truth, extra_info=None)`,
and returns a float or a dict with "score" (other scalar entries are kept as extras). Built in:

    math           math-verify on the last closed \\boxed{...}, or on the whole text when there is none
    boxed          the text in the last closed \\boxed{...} equals the truth: without spaces, or as a number
    last_number    the last number in the text equals the truth
    exact          the text equals the truth, but for white space around it
    reasoning_gym  the task's own score_answer on the last box, else on <answer>...</answer>, else on the text

and `path/to/file.py:function` for a user's own. Each is imported only when it is first asked for, in the
worker (math-verify and reasoning-gym take seconds); this module itself imports the standard library only.

Traps. (1) math-verify reads two boxes as a set, so that `\\boxed{41} ... \\boxed{42}` is wrong for 42: only
the last closed box is handed over. (2) It evaluates: `\\boxed{6*7}` counts as 42. Where restating the
question would score (plain arithmetic), use `boxed` or `last_number`. (3) Its time limits are SIGALRM, in
whole seconds and in the main thread only, and default to 5 s twice; both are set here. An answer that hits
one scores 0 and carries `timed_out: 1`, because an answer that cannot be read in that time is a wrong
answer; a *ground truth* that cannot be read raises. (4) reasoning-gym gives small partial credit for any
text, hence the threshold at 1. Its entries hold tuples, which JSON turns into lists and some scorers then
misjudge: the entry is made again from (name, params, seed, index), and its question compared.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from treepo_mega.errors import TreepoError
from treepo_mega.text.boxes import last_box

Verifier = Callable[..., Any]

BUILT_IN = ("math", "boxed", "last_number", "exact", "reasoning_gym")

MATH_TIMEOUT_S = 2
"""math-verify's limit for parsing, and again for comparing; whole seconds."""

_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
_PLAIN = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?")
_FRACTION = re.compile(r"([-+]?)(?:\\[dt]?frac\{([-+]?[0-9]+)\}\{([-+]?[0-9]+)\}|([0-9]+)/([0-9]+))")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class VerifierError(TreepoError):
    """A verifier that cannot be used: unknown name, missing file or function, failing import."""


def as_number(text: str) -> Fraction | None:
    """The exact number that `text` spells (integer, decimal, a/b, \\frac{a}{b}; thousands commas), or None.

    Nothing is evaluated, and long digit strings and large exponents are refused: `text` is a model's.
    """
    t = (
        text.strip()
        .strip("$")
        .replace("\u2212", "-")
        .replace("\\,", "")
        .replace("\\!", "")
        .replace(" ", "")
        .rstrip(".")
    )
    if len(t) > 200:
        return None
    if re.fullmatch(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", t):
        t = t.replace(",", "")
    if _PLAIN.fullmatch(t):
        return Fraction(t)
    m = _FRACTION.fullmatch(t)
    if m is None:
        return None
    sign, a, b, c, d = m.groups()
    top, bottom = int(a or c), int(b or d)
    return None if bottom == 0 else Fraction(top, bottom) * (-1 if sign == "-" else 1)


def exact(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the answer is the truth, but for white space around it."""
    return float(solution_str.strip() == ground_truth.strip())


def boxed(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the last closed box holds the truth: the same text without white space, or the same number."""
    content = last_box(solution_str)
    if content is None:
        return 0.0
    if "".join(content.split()) == "".join(ground_truth.split()):
        return 1.0
    truth = as_number(ground_truth)
    return float(truth is not None and as_number(content) == truth)


def last_number(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 when the last number in the text equals the truth. Raises ValueError when the truth is no plain number."""
    truth = as_number(ground_truth)
    if truth is None or not _NUMBER.fullmatch(ground_truth.strip()):
        raise ValueError(f"last_number: the ground truth {ground_truth[:80]!r} is not an integer or a decimal")
    numbers = _NUMBER.findall(solution_str.replace("\u2212", "-"))
    return float(bool(numbers) and as_number(numbers[-1]) == truth)


def _load_math() -> Verifier:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    @lru_cache(maxsize=4096)
    def gold(ground_truth: str) -> list[Any]:
        text = last_box(ground_truth) or ground_truth.strip().strip("$")
        parsed = parse(f"\\boxed{{{text}}}", parsing_timeout=MATH_TIMEOUT_S)
        if not parsed:
            raise ValueError(f"math: the ground truth {ground_truth[:80]!r} cannot be parsed")
        return parsed

    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
    ) -> dict[str, float]:
        """math-verify on the last closed box, else the whole text; 0 with a flag when it times out or cannot parse."""
        truth = gold(ground_truth)
        content = last_box(solution_str)
        text = solution_str if content is None else f"\\boxed{{{content}}}"
        try:
            answer = parse(text, parsing_timeout=MATH_TIMEOUT_S, raise_on_error=True)
            right = verify(truth, answer, timeout_seconds=MATH_TIMEOUT_S, raise_on_error=True)
        except TimeoutException:
            return {"score": 0.0, "timed_out": 1.0}
        except MemoryError:
            raise
        except Exception:
            # Parsers raise all manner of things on text that is not mathematics; such an answer is wrong.
            return {"score": 0.0, "unparsable": 1.0}
        return {"score": float(right)}

    # The grammar is built on first use (0.3 s and more). Outside a main thread SIGALRM cannot be set and every
    # answer would look wrong.
    if compute_score("", "\\boxed{\\frac{1}{2}}", "0.5")["score"] != 1.0:
        raise VerifierError("math: math-verify does not find 1/2 equal to 0.5; it runs in a main thread only")
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
        entry = task[index]
        if entry["question"] != question:
            raise ValueError(f"reasoning_gym: item {index} of {ref['name']} is not the prompt's question any more")
        tagged = _ANSWER_TAG.findall(solution_str)
        answer = last_box(solution_str) or (tagged[-1].strip() if tagged else solution_str.strip())
        raw = float(task.score_answer(answer, entry))
        return {"score": float(raw >= 1.0), "raw_score": raw}

    return compute_score


def _split_user(name: str) -> tuple[Path, str] | None:
    """(file, function) of `path/to/file.py:function`; None when `name` is no such thing."""
    path, colon, function = name.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") and function else None


def check_verifier(name: str) -> None:
    """Raise VerifierError unless `name` is built in or a function that its file defines (nothing is run).

    The message names what is known, and the nearest name.
    """
    if name in BUILT_IN:
        return
    user = _split_user(name)
    if user is None:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise VerifierError(
            f"unknown verifier {name!r}: {hint}expected {', '.join(BUILT_IN)} or path/to/file.py:function"
        )
    path, function = user
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except OSError as e:
        raise VerifierError(f"verifier {name!r}: cannot read {path}: {e.strerror or e}") from None
    except (SyntaxError, ValueError) as e:
        raise VerifierError(f"verifier {name!r}: {path} is not valid Python: {e}") from None
    defined = _top_level_names(tree)
    if function not in defined:
        near = difflib.get_close_matches(function, sorted(defined), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"it defines: {', '.join(sorted(defined)) or 'nothing'}"
        raise VerifierError(f"verifier {name!r}: {path} defines no {function!r}; {hint}")


def _top_level_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def load_verifier(name: str) -> Verifier:
    """Import what verifier `name` needs and return its function. Runs the user's file: workers only.

    Raises VerifierError for an unknown name, and whatever the user's file raises while it is imported.
    """
    check_verifier(name)
    if name == "math":
        return _load_math()
    if name == "reasoning_gym":
        return _load_reasoning_gym()
    user = _split_user(name)
    if user is None:
        return {"boxed": boxed, "last_number": last_number, "exact": exact}[name]
    path, function = user
    module_name = f"treepo_mega_user_verifier_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise VerifierError(f"verifier {name!r}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and the like look their module up
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # its neighbours, after everything else
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise VerifierError(f"verifier {name!r}: {function!r} is {type(found).__name__}, expected a function")
    return found
