"""What each verifier accepts, and that finding a box or a number is safe on hostile text."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mega.data.rewards.answers import as_number
from treepo_mega.data.rewards.verifiers import (
    VerifierError,
    boxed,
    check_verifier,
    exact,
    last_number,
    load_verifier,
)
from treepo_mega.text.boxes import last_box


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{41} no, \boxed{42}", "42"),
        (r"\boxed{42} and \boxed{4", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{\boxed{ \boxed{42} }}", "42"),
        (r"\boxed{x = \boxed{3}}", r"x = \boxed{3}"),
        (r"{ { \boxed{7}", "7"),
        (r"} } \boxed{7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"put it in \boxed{}", None),
        (r"\boxed{5}; put it in \boxed{}", "5"),
        (r"\boxed{42", None),
        ("boxed{42}", None),
        ("", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_box(text) == content


@given(st.text(alphabet="\\boxed{} 1", max_size=200))
def test_last_box_never_raises_and_gives_text_that_is_there(text: str) -> None:
    found = last_box(text)
    assert found is None or (found and found in text)


@pytest.mark.parametrize(
    "text, number",
    [
        ("42", Fraction(42)),
        (" 1,000.50 ", Fraction(2001, 2)),
        ("$-3$", Fraction(-3)),
        ("\u22123", Fraction(-3)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{6}{8}", Fraction(-3, 4)),
        (r"\dfrac{-1}{2}", Fraction(-1, 2)),
        ("1e3", Fraction(1000)),
        ("42.", Fraction(42)),
        ("1/0", None),
        ("6*7", None),
        ("1,00", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("forty-two", None),
        ("", None),
    ],
)
def test_as_number(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    "answer, truth, score",
    [
        (r"\boxed{ 4 2 }", "42", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{(x + 1)}", "(x+1)", 1.0),
        (r"\boxed{6*7}", "42", 0.0),
        (r"\boxed{42} \boxed{41}", "42", 0.0),
        ("42", "42", 0.0),
    ],
)
def test_boxed(answer: str, truth: str, score: float) -> None:
    assert boxed("x", answer, truth) == score


@pytest.mark.parametrize(
    "answer, truth, score",
    [
        ("3 apples and 4 pears make 7.", "7", 1.0),
        ("so 5-4", "4", 1.0),
        ("it is -4", "-4", 1.0),
        ("it is \u22124", "-4", 1.0),
        ("1,234 in all", "1234", 1.0),
        ("about .5", "0.50", 1.0),
        ("7 or 8", "7", 0.0),
        ("none", "7", 0.0),
    ],
)
def test_last_number(answer: str, truth: str, score: float) -> None:
    assert last_number("x", answer, truth) == score


def test_last_number_refuses_a_truth_that_no_answer_could_match() -> None:
    with pytest.raises(ValueError, match=r"'seven' is not an integer or a decimal"):
        last_number("x", "7", "seven")


def test_exact_ignores_only_outer_white_space() -> None:
    assert exact("x", " a b\n", "a b") == 1.0
    assert exact("x", "a  b", "a b") == 0.0


@pytest.mark.parametrize(
    "answer, truth, score",
    [
        (r"\boxed{42}", "42", 1.0),
        (r"\boxed{41} wait, \boxed{42}", "42", 1.0),
        (r"\boxed{42} wait, \boxed{41}", "42", 0.0),
        ("The answer is 42", "42", 1.0),
        (r"\boxed{\frac{2}{4}}", "0.5", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{42}", r"The sum is $6 \cdot 7$, so \boxed{42}.", 1.0),
        ("no answer", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_math(answer: str, truth: str, score: float) -> None:
    assert load_verifier("math")(data_source="x", solution_str=answer, ground_truth=truth)["score"] == score


def test_math_says_when_an_answer_could_not_be_read_in_time() -> None:
    result = load_verifier("math")(data_source="x", solution_str=r"\boxed{9^{9^{9^9}}}", ground_truth="42")
    assert result == {"score": 0.0, "timed_out": 1.0, "unparsable": 0.0}


def test_unknown_names_come_with_the_nearest(tmp_path: Path) -> None:
    unknown = r"unknown verifier 'maths' \(did you mean 'math'\?\): expected math, boxed"
    with pytest.raises(VerifierError, match=unknown):
        check_verifier("maths")
    file = tmp_path / "mine.py"
    with pytest.raises(VerifierError, match=r"cannot read .*mine.py: No such file"):
        check_verifier(f"{file}:compute_score")
    file.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n")
    check_verifier(f"{file}:compute_score")
    with pytest.raises(VerifierError, match=r"defines no 'compute_scores' \(did you mean 'compute_score'\?\)"):
        check_verifier(f"{file}:compute_scores")
    file.write_text("def compute_score(:\n")
    with pytest.raises(VerifierError, match=r"mine.py is not valid Python"):
        check_verifier(f"{file}:compute_score")


def test_checking_a_users_file_does_not_run_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit('ran')\ndef f(**kw):\n    return 1.0\n")
    check_verifier(f"{file}:f")


def test_the_worker_imports_neither_torch_nor_anything_heavy() -> None:
    code = (
        "import sys, treepo_mega.data.rewards.worker as w; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'megatron', 'vllm', 'transformers', 'numpy', 'pydantic', 'sympy', 'math_verify', 'reasoning_gym'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
