"""The answer-box parser: what it reads, and that stopping and grading never disagree."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.data.rewards.verifiers import boxed
from treepo_mega.text.boxes import closed_box, last_box
from treepo_mega.tree.stop import StopRules

EOS = 0
PIECES = [
    "",
    "\\",
    "\\bo",
    "xed",
    "\\boxed",
    "\\fbox",
    " ",
    "{",
    "}",
    "\\{",
    "\\}",
    "4",
    "2",
    "12",
    ".",
    "$",
    "x",
    "\n",
]
PIECES += ["<think>", "</think>", "\\boxed{", "\\frac{1}{2}", "}.", "{}", "\\\\", ","]


@pytest.mark.parametrize(
    "text, closed, content",
    [
        (r"\boxed{42} rest", r"\boxed{42}", "42"),
        (r"\boxed {42} rest", r"\boxed {42}", "42"),
        ("\\boxed\n{42} rest", "\\boxed\n{42}", "42"),
        (r"\fbox{42} rest", r"\fbox{42}", "42"),
        (r"\fbox {\frac{1}{2}} rest", r"\fbox {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed 7 rest", r"\boxed 7 ", "7"),
        (r"$\boxed 7$ rest", r"$\boxed 7$", "7"),
        (r"\boxed 1,234.5. rest", r"\boxed 1,234.5. ", "1,234.5"),
        (r"\boxed 7", None, "7"),
        (r"\boxed7 rest", r"\boxed7 ", "7"),
        (r"\boxed{\boxed 7}", r"\boxed{\boxed 7}", "7"),
        (r"\boxed notation helps", None, None),
        (r"\boxed 7x", None, None),
        (r"\boxedness{7}", None, None),
        (r"\\boxed{7} rest", r"\\boxed{7}", "7"),
        (r"\\\\boxed{7} rest", r"\\\\boxed{7}", "7"),
        (r"\boxed{\{1,2\}} rest", r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\\} rest", r"\boxed{a\\}", r"a\\"),
        (r"\boxed{1} \boxed{2}", r"\boxed{1}", "2"),
        (r"\boxed{1</think>2}", None, None),
        (r"\boxed{1}</think>\boxed{2}", r"\boxed{1}", "2"),
        (r"\boxed{1}</think> so", r"\boxed{1}", None),
        (r"{\boxed{3", None, None),
    ],
)
def test_what_is_a_box(text: str, closed: str | None, content: str | None) -> None:
    end = closed_box(text)
    assert (None if end is None else text[:end]) == closed
    assert last_box(text) == content


@examples(400)
@given(st.lists(st.sampled_from(range(1, len(PIECES))), min_size=1, max_size=30), st.lists(st.integers(1, 29)))
def test_a_path_stops_at_the_box_that_is_graded_however_it_is_cut(tokens: list[int], borders: list[int]) -> None:
    def decode(ids: list[int]) -> str:
        return "".join(PIECES[i] for i in ids)

    rules = StopRules(frozenset({EOS}), decode, 1000, 1000, repetition_window=0)
    cuts = [0, *sorted({b for b in borders if b < len(tokens)}), len(tokens)]
    path: list[int] = []
    stopped = None
    for depth, (start, end) in enumerate(itertools.pairwise(cuts), 1):
        verdict = rules.judge(path, tokens[start:end], depth)
        path += tokens[start : start + verdict.keep]
        stopped = verdict.reason
        if stopped is not None:
            break
    response = decode(path)
    if stopped is None:
        assert path == tokens
        assert closed_box(response) is None
        # A bare number at the very end is complete for grading, because nothing follows.
        assert last_box(response) is None or closed_box(response + " ") is not None
        return
    assert stopped == "answer"
    assert closed_box(decode(path[:-1])) is None
    answer = last_box(response[: closed_box(response)])
    assert answer is not None
    assert boxed("", response, answer) == 1.0 or "</think>" in PIECES[path[-1]]


@given(st.text(alphabet="\\boxedfk{}<>/thin 17.$", max_size=80), st.text(alphabet="\\boxed{} 1.,", max_size=20))
def test_a_closed_box_stays_closed_whatever_follows(text: str, more: str) -> None:
    end = closed_box(text)
    if end is not None:
        assert closed_box(text + more) == end
        assert closed_box(text[:end]) == end


@pytest.mark.parametrize("unit", ["\\", "\\boxed ", "\\boxed{", "{", "\\boxed 1", "\\boxed" + " " * 50, "</think>"])
def test_hostile_text_is_read_in_linear_time(unit: str) -> None:
    """100,000 repetitions; a quadratic scan would pass any test's patience."""
    text = unit * 100_000
    assert closed_box(text) is None or closed_box(text) <= len(text)
    assert last_box(text) is None or last_box(text) in text
