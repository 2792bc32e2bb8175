"""Tokens that lie on another rank: a length without contents.

    node.tokens = Elsewhere.of(512)
    len(node.tokens)            # 512
    node.tokens[0]              # raises TokensElsewhere

Every rank holds the structure of every tree of a step, and the contents of those alone that its engine sampled. What
counts tokens works on both kinds of trees. What reads them fails with a message, and never on an empty list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

from treepo_mega.errors import TreepoError


class TokensElsewhere(TreepoError):
    """Code read the contents of a segment that another rank's engine sampled; the message says how many tokens."""


class Elsewhere(Sequence[Any]):
    """The place of a list of `length` tokens, logprobs or entropies."""

    __slots__ = ("_length",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, length: int) -> None:
        self._length = length

    @classmethod
    def of(cls, length: int) -> list[Any]:
        """A place where a `Node` has a list; typed so that code which counts takes both."""
        return cast("list[Any]", cls(length))

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Elsewhere) and other._length == self._length

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    def __iter__(self) -> Iterator[Any]:
        self._refuse()

    def __repr__(self) -> str:
        return f"Elsewhere({self._length})"

    def _refuse(self) -> NoReturn:
        raise TokensElsewhere(
            f"these {self._length} tokens are on the rank whose engine sampled them; here only their number is known. "
            "What needs contents is computed there (rollout/README.md, data plane)"
        )


def is_here(contents: Sequence[Any]) -> bool:
    """Whether a segment's tokens, logprobs or entropies can be read on this rank."""
    return type(contents) is not Elsewhere
