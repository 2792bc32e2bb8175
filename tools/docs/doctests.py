"""Griffe extension for the documentation site: sets each interactive example of a docstring as a block of code.

Markdown reads `>>>` as nested quotations and `['a']` in an answer as a reference to another page.
Both are wrong for an example, and the second ends a strict build.
"""

import re
from typing import Any

import griffe

# A prompt opens an example; what follows it belongs to it up to a blank line.
EXAMPLE = re.compile(r"(?:^[ ]*>>>.*\n?(?:^[ ]*\S.*\n?)*(?:\n(?=[ ]*>>>))?)+", re.MULTILINE)


def fenced(text: str) -> str:
    r"""The docstring with its examples between fences.

    >>> fenced("Adds.\n\n>>> 1 + 1\n2\n")
    'Adds.\n\n```pycon\n>>> 1 + 1\n2\n```\n'
    """

    def fence(match: re.Match[str]) -> str:
        example = match.group(0).rstrip("\n")
        indent = example[: len(example) - len(example.lstrip(" "))]
        return f"{indent}```pycon\n{example}\n{indent}```\n"

    return EXAMPLE.sub(fence, text)


class Doctests(griffe.Extension):
    """Rewrites the docstring of every object before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
