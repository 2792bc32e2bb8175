"""Whole HF tensors out of Megatron's shards, on every rank; and a module that holds given parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.reshard.execute import Resharder, TensorTarget
from treepo_mega.reshard.params import Chunks
from treepo_mega.reshard.sides import Side, files_side, grid_of, mcore_side
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import device


def whole_side(spec: ModelSpec, world_size: int) -> Side:
    """Every rank wants every HF tensor. What a rank holds itself, it takes from itself: no replica goes unseen."""
    return Side(files_side(spec, 1).layouts, np.zeros(world_size, np.int64))


def whole_tensors(
    cfg: Config, spec: ModelSpec, chunks: Chunks, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`chunks` (this rank's parameters of `dtype`, or their gradients) as HF tensors. Collective over all ranks."""
    world = dist.world_size()
    resharder = Resharder.between(
        mcore_side(spec, grid_of(cfg), world),
        whole_side(spec, world),
        source_dtype=dtype,
        target_dtype=dtype,
        bucket_bytes=16 << 20,
        timeout_s=60,
    )
    # Not a number: an element that nobody writes shows in every comparison.
    whole = {n: torch.full(s, torch.nan, dtype=dtype, device=device()) for n, s in hf_shapes(spec).items()}
    resharder(chunks, TensorTarget([whole]))
    return whole


def module_of(params: dict[str, Tensor]) -> nn.Module:
    """A module whose parameters have these dotted names, as far as an export looks at a model."""
    root = nn.Module()
    for name, value in params.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, nn.Parameter(value, requires_grad=False))
    return root
