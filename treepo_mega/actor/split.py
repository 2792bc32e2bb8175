"""Packs that are too large for the memory that is left: halves of them, for another attempt.

    try:
        run_schedule(chunks, packs, ...)
    except RuntimeError as error:
        if not is_out_of_memory(error): raise
    packs = split(packs, multiple)        # half as long, with the same rows

A pack is cut between two of its trees, which see nothing of one another. A sum over rows stays what it was, but for the
order of its terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from treepo_mega.actor.forward import TOKEN_FIELDS
from treepo_mega.errors import TreepoError
from treepo_mega.tree.pack import Pack
from treepo_mega.tree.routing import padded

ON_CPU = "DefaultCPUAllocator: can't allocate memory"
"""torch has no exception of its own for the host's memory."""


class PacksTooLarge(TreepoError):
    """A pass over packs ran out of memory, and smaller packs are not to be had."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on the device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or ON_CPU in str(error)


def split(packs: Sequence[Pack], multiple: int) -> list[Pack] | None:
    """Each pack of several trees as two, as even as its trees allow, padded to `multiple` tokens.

    None where no pack has two trees. Raises ValueError for a pack of which this rank has a part (context parallelism).
    """
    halves = [_halves(pack, multiple) for pack in packs]
    return None if len(halves) == sum(map(len, halves)) else [half for of_pack in halves for half in of_pack]


def _halves(pack: Pack, multiple: int) -> list[Pack]:
    if pack.local is not None:
        raise ValueError("a pack whose tokens several ranks share cannot be split by one of them")
    if len(pack.blocks) < 2:
        return [pack]
    end = pack.blocks[-1][1]
    _, cut = min(pack.blocks[:-1], key=lambda block: abs(2 * block[1] - end))
    return [_part(pack, 0, cut, multiple), _part(pack, cut, end, multiple)]


def _part(pack: Pack, start: int, end: int, multiple: int) -> Pack:
    """The trees of the tokens [start, end), as a pack of their own."""
    size = end - start
    length = -(-max(size, 2) // multiple) * multiple
    tokens = np.zeros(length, pack.tokens.dtype)
    tokens[:size] = pack.tokens[start:end]
    position = np.zeros(length, pack.position.dtype)
    position[:size] = pack.position[start:end]
    # Padding is visible to itself alone.
    subtree_end = np.arange(1, length + 1, dtype=pack.subtree_end.dtype)
    subtree_end[:size] = pack.subtree_end[start:end] - start
    rows = np.flatnonzero((pack.predictor >= start) & (pack.predictor < end))
    arrays = {spec.name: getattr(pack, spec.name) for spec in fields(pack) if spec.name not in TOKEN_FIELDS}
    cut: dict[str, Any] = {name: array[rows] for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return replace(
        pack,
        **cut | {"predictor": pack.predictor[rows] - start},
        tokens=tokens,
        position=position,
        subtree_end=subtree_end,
        blocks=[(first - start, last - start) for first, last in pack.blocks if start <= first < end],
        experts=None if pack.experts is None else padded(pack.experts[start:end], length),
        # The guard's sample names rows of the whole pack.
        watched=None,
    )
