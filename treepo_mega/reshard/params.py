"""A rank's parameters by name, and whether they are those of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.modelspec.mcore_layout import ParamLayout

Chunks = Sequence[Mapping[str, Tensor]]
"""A rank's parameters by name, one mapping per model chunk."""


class ReshardError(TreepoError):
    """Parameters and map disagree; the message names the parameter, what was expected and what was found."""


def check_params(
    params: Mapping[str, Tensor], layout: Mapping[str, ParamLayout], dtype: torch.dtype | None = None
) -> None:
    """Raise ReshardError unless names and shapes are exactly those of the map, and every dtype is `dtype` if given."""
    for name in layout:
        if name not in params:
            raise ReshardError(f"the model has no parameter {name}, which the map expects{nearest(name, params)}")
    for name, value in params.items():
        if name not in layout:
            hint = nearest(name, layout)
            raise ReshardError(f"the model's parameter {name} {list(value.shape)} is not in the map{hint}")
        if tuple(value.shape) != layout[name].shape:
            raise ReshardError(
                f"parameter {name} has shape {list(value.shape)}; the map expects {list(layout[name].shape)}"
            )
        if dtype is not None and value.dtype != dtype:
            raise ReshardError(f"parameter {name} has dtype {value.dtype}; expected {dtype}")


def check_chunks(
    chunks: Chunks, layouts: Sequence[Mapping[str, ParamLayout]], dtype: torch.dtype | None = None
) -> None:
    """`check_params` for every chunk. Raises ReshardError, also for another number of chunks."""
    if len(chunks) != len(layouts):
        raise ReshardError(f"{len(chunks)} model chunks; expected {len(layouts)}")
    for params, layout in zip(chunks, layouts, strict=True):
        check_params(params, layout, dtype)
