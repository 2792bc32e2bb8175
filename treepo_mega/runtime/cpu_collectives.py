"""Collectives of parts of different lengths over gloo, which only takes parts of one length.

Experts that are cut over tensor-parallel ranks gather the tokens of their group: each rank has as many as the router
sent it. NCCL takes such lists; gloo stops at the second part. So each part is padded to the longest, and cut again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def _padded(part: Tensor, length: int) -> Tensor:
    """`part` [n, ...] with zeros below it, [length, ...]."""
    out = part.new_zeros((length, *part.shape[1:]))
    out[: len(part)] = part
    return out


def gather_parts(part: Tensor, group: Any, sizes: Sequence[int]) -> Tensor:
    """This rank's `part` [sizes[rank], ...] -> the parts of all ranks of `group` below each other [sum(sizes), ...].

    One all-gather over `group` of max(sizes) rows a rank.
    """
    longest = max(sizes)
    found = [part.new_empty((longest, *part.shape[1:])) for _ in sizes]
    torch.distributed.all_gather(found, _padded(part, longest), group=group)
    return torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)])


def reduce_scatter_parts(whole: Tensor, group: Any, sizes: Sequence[int]) -> Tensor:
    """[sum(sizes), ...] on each rank -> the sum over ranks of this rank's part [sizes[rank], ...].

    One reduce-scatter over `group` of max(sizes) rows a rank.
    """
    longest = max(sizes)
    parts = [_padded(part, longest) for part in torch.split(whole, list(sizes))]
    out = torch.empty_like(parts[0])
    torch.distributed.reduce_scatter(out, parts, group=group)
    return out[: sizes[group.rank()]].contiguous()


def take_over(mappings: ModuleType) -> None:
    """Put both in the place of what `megatron.core.tensor_parallel.mappings` does with sizes; the rest stays."""
    names = vars(mappings)
    for name, ours in (
        ("_gather_along_first_dim", gather_parts),
        ("_reduce_scatter_along_first_dim", reduce_scatter_parts),
    ):
        names[name] = _with_sizes(names[name], ours)


def _with_sizes(shipped: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(values: Tensor, group: Any, sizes: Sequence[int] | None = None, use_buffer: bool = False) -> Tensor:
        if sizes is None or group.size() == 1:
            return shipped(values, group, sizes, use_buffer)
        return ours(values, group, sizes)

    return function
