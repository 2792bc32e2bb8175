"""Experts that the engine chose for tokens: `[tokens, layers, top_k]` in one byte each (two from 256 experts on).

    experts = Experts(array)              # of a node's first len(experts) tokens
    tree.note(node_id, experts, begin=7)  # what the engine returned, from place 7 of the path on

A node notes experts for its first tokens alone: the last token of a path is never computed by the engine, and that of
a segment is computed with the segment after it. So what a request computed of its prefix is noted in the nodes above.
What is noted first stays: a token in the cache keeps the experts that it was computed with.

In arrays over many tokens the largest number of the type stands for a token without noted experts (`unnoted`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from treepo_mega.tree.node import Node

ExpertIds = npt.NDArray[np.unsignedinteger[Any]]
"""[tokens, layers, top_k] uint8 or uint16."""


def dtype_of(num_experts: int) -> np.dtype[Any]:
    """The type of ids of `num_experts` experts, with one number to spare.

    >>> dtype_of(255), dtype_of(256)
    (dtype('uint8'), dtype('uint16'))
    """
    return np.dtype(np.uint8 if num_experts <= np.iinfo(np.uint8).max else np.uint16)


def unnoted(dtype: npt.DTypeLike) -> int:
    """The number that stands for no expert in ids of this type."""
    return int(np.iinfo(np.dtype(dtype)).max)


def no_experts(tokens: int = 0) -> ExpertIds:
    """[tokens, 0, 0]: of a forest that carries no experts."""
    return np.zeros((tokens, 0, 0), np.uint8)


class Experts:
    """Experts of consecutive tokens; not changed once made. Slices are views."""

    __slots__ = ("ids",)

    def __init__(self, ids: ExpertIds) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Experts:
        return Experts(self.ids[part])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Experts):
            return NotImplemented
        # Of no tokens there is no shape to compare.
        return len(self) == len(other) and (not len(self) or np.array_equal(self.ids, other.ids))

    def __hash__(self) -> int:
        # Hashable, so that a dataclass takes one for a default.
        return len(self)

    def __repr__(self) -> str:
        return f"Experts(of {len(self)} tokens)"

    def followed_by(self, more: Experts) -> Experts:
        """These tokens, then those of `more`."""
        return Experts(np.concatenate([self.ids, more.ids])) if len(self) else more

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; `from_dict` is its inverse."""
        ids = np.ascontiguousarray(self.ids)
        return {
            "dtype": ids.dtype.name,
            "shape": list(ids.shape),
            "ids": base64.b64encode(ids.tobytes()).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Experts:
        """Of what `to_dict` made."""
        ids = np.frombuffer(base64.b64decode(stored["ids"]), stored["dtype"])
        return cls(ids.reshape(stored["shape"]))


NONE_NOTED = Experts(no_experts())
"""Of a node that has no experts noted."""


def ids_of(nodes: Iterable[Node], lengths: npt.NDArray[np.integer[Any]]) -> ExpertIds:
    """[tokens, layers, top_k] of all tokens of `nodes`, which have `lengths`; [tokens, 0, 0] where none has experts."""
    held = [(index, node.experts) for index, node in enumerate(nodes) if len(node.experts)]
    size = int(lengths.sum())
    if not held:
        return no_experts(size)
    first = held[0][1].ids
    ids = np.full((size, *first.shape[1:]), unnoted(first.dtype), first.dtype)
    starts = (np.cumsum(lengths) - lengths).tolist()
    for index, experts in held:
        ids[starts[index] : starts[index] + len(experts)] = experts.ids
    return ids


def padded(ids: ExpertIds, length: int) -> ExpertIds:
    """`ids`, and after them tokens without experts, `length` in all."""
    return np.concatenate([ids, np.full((length - len(ids), *ids.shape[1:]), unnoted(ids.dtype), ids.dtype)])


def widened(ids: ExpertIds, like: ExpertIds) -> ExpertIds:
    """`ids` in the shape and type of `like`: where it carries no experts, none are noted."""
    if ids.shape[1:] == like.shape[1:]:
        return ids
    return np.full((len(ids), *like.shape[1:]), unnoted(like.dtype), like.dtype)


def joined(parts: Sequence[ExpertIds]) -> ExpertIds:
    """The tokens of all parts, of which some may carry no experts."""
    if not parts:
        return no_experts()
    like = max(parts, key=lambda part: part.shape[1] * part.shape[2])
    return np.concatenate([widened(part, like) for part in parts])
