"""What an environment adds to prompts: its tools in the chat template, and what its reset says of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from treepo_mega.data.chat import Said
from treepo_mega.data.rows import PromptError, Row


class Opener(Protocol):
    """The part of an environment that prompts need (`environment/setup.py` has one)."""

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        """JSON schemas, as chat templates take them."""

    def openings(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str | None]:
        """What reset returns for each (prompt id, row), in order."""


def sendable(row: Row) -> dict[str, Any]:
    """The row as `reset(**row)` gets it. Raises PromptError for values that JSON cannot hold, and for other keys."""
    for key in row.values:
        if not isinstance(key, str) or not key.isidentifier():
            raise PromptError(
                f"{row.where}: the key {key!r} cannot be an argument of the environment's reset(**row): expected names "
                "of letters, digits and underscores"
            )
    try:
        json.dumps(row.values)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{row.where}: the row cannot be sent to the environment: {error}") from None
    return dict(row.values)


def with_opening(said: Said, opening: str | None) -> Said:
    """The prompt with what reset returned behind its last message.

    >>> with_opening((("user", "Guess."),), " It is odd.")
    (('user', 'Guess. It is odd.'),)
    """
    if not opening:
        return said
    if isinstance(said, str):
        return said + opening
    role, content = said[-1]
    return (*said[:-1], (role, content + opening))
