r"""The one parser of answer boxes: what closes a box ends a path (tree/stop.py) and is what grading reads.

    closed_box(text)    where the first closed box ends, or None: the path stops there
    last_box(text)      what the last closed box holds, or None: the answer that is graded

A box is `\boxed{...}` or `\fbox{...}`. White space may stand before the brace. Up to four backslashes count as
one, because double-escaped JSON has several. Braces nest; `\{` and `\}` are characters, not braces. An empty box
(`put it in \boxed{}`) is talk about an answer, not an answer. TeX's form without braces, `\boxed 7`, counts for
plain numbers only: `\boxed notation` is prose. White space or closing punctuation ends such a number, and so does
the end of the response.

`</think>` ends the thinking: boxes before it are drafts, and grading leaves them out. Stopping cannot look ahead,
so a box inside the thinking ends the path unless `rollout.stop.answer_box` is false.

A path that stopped at a box holds exactly one closed box, so both functions then name the same one
(tests/test_boxes.py). Text is scanned once from left to right, in linear time, and never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = r"[-+]?\.?[0-9][0-9.,/]*\\?%?"
_STOPS = r"\s$}\]);:!?"
# The boxes come before `\\.`, which would eat the backslash of `\boxed{` and leave a plain brace.
_TOKENS = re.compile(
    r"(?P<box>\\{1,4}(?:boxed|fbox)\s*\{)"
    rf"|\\{{1,4}}(?:boxed|fbox)\s*(?P<bare>{_NUMBER})(?=(?P<stop>[{_STOPS}])|\Z)"
    r"|</think>|\\.|[{}]",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Box:
    """A closed, non-empty box: `content` without outer white space; it spans text[start:end]."""

    content: str
    start: int
    end: int
    inner: int
    """Where the content begins."""
    complete: bool = True
    """False for a bare number that only the end of the text ended: more digits may follow."""


def _boxes(text: str) -> Iterator[Box | None]:
    """Boxes in the order in which they close; None where the thinking ends."""
    # (start, start of the content) of each open brace; content -1: no box.
    opened: list[tuple[int, int]] = []
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token == "</think>":
            # A box left open in the thinking would close at any brace behind it and give an answer that spans both.
            opened.clear()
            yield None
        elif token == "{":
            opened.append((match.start(), -1))
        elif token == "}":
            if not opened:
                continue
            start, inner = opened.pop()
            if inner >= 0 and (content := text[inner : match.start()].strip()):
                yield Box(content, start, match.end(), inner)
        elif match["bare"] is not None:
            number = match["bare"].rstrip(".,/")
            closed = match["stop"] is not None
            yield Box(number, match.start(), match.end() + closed, match.start("bare"), closed)
        elif match["box"] is not None:
            opened.append((match.start(), match.end()))


def closed_box(text: str) -> int | None:
    r"""Index just behind what closes the first answer box; None without a closed box.

    A bare number is closed by the character behind it, which is included. Once closed, a box stays closed whatever
    follows.

    >>> closed_box(r"so \boxed {42}. And")
    14
    """
    # While sampling, the text is a prefix: `\boxed 4` at its end may become `\boxed 42`, and is not complete.
    return next((box.end for box in _boxes(text) if box is not None and box.complete), None)


def last_box(text: str) -> str | None:
    r"""Content of the last closed box behind the thinking, None without one.

    A box that holds nothing but another box gives the inner one's content.

    >>> last_box(r"\boxed{41}, no: \fbox{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    found: Box | None = None
    for box in _boxes(text):
        if box is None:
            found = None
        # The inner box closes first. Its wrapper comes next and would replace the answer by the text of a box.
        elif found is not None and _wraps(text, box, found):
            found = Box(found.content, box.start, box.end, found.inner)
        else:
            found = box
    return None if found is None else found.content


def _wraps(text: str, outer: Box, inner: Box) -> bool:
    """Whether `outer` holds `inner` and nothing else but white space."""
    if inner.start < outer.inner:
        return False
    return not text[outer.inner : inner.start].strip() and not text[inner.end : outer.end - 1].strip()
