"""HF weights into Megatron's sharded parameters: each rank reads the slices that it holds, and no others.

    load_from_hf(models, spec, cfg, hf_dir)          # every chunk of this rank; needs Megatron's parallel state
    fill_local(local_params(chunk), layout, reader)  # one chunk, by its map

The other way, from Megatron's parameters to whole HF tensors, is a reshard (`reshard/README.md`, `export.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state as ps
from torch import Tensor, nn

from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import NAMING, Box, ModelSpec, ParamLayout, chunk_layouts
from treepo_mega.reshard.params import check_params

Reader = Callable[[str, Box], Tensor]


def local_params(chunk: nn.Module) -> dict[str, Tensor]:
    """A chunk's parameters by Megatron's names, without the `module.` that wrappers (DDP, Float16Module) prepend."""
    out = {}
    for name, param in chunk.named_parameters():
        while name.startswith("module."):
            name = name.removeprefix("module.")
        out[name] = param.data
    return out


@torch.no_grad()
def fill_local(params: Mapping[str, Tensor], layout: Mapping[str, ParamLayout], reader: HfReader | Reader) -> int:
    """Fill one chunk's parameters in place from HF slices, cast to each parameter's dtype; padding becomes zero.

    `reader` is an HfReader or a function (hf_name, box) -> tensor. Returns the bytes filled.
    Raises ReshardError when the parameters are not those of the map.
    """
    check_params(params, layout)
    read = reader.read if isinstance(reader, HfReader) else reader
    filled = 0
    for name, spec in layout.items():
        param = params[name]
        # Padding has no block: it must not keep what the memory held before.
        if sum(block.numel for block in spec.blocks) < param.numel():
            param.zero_()
        for block in spec.blocks:
            param[block.local_index].copy_(read(block.hf_name, block.hf_slice))
            filled += block.numel * param.element_size()
    return filled


def load_from_hf(
    models: Sequence[nn.Module], spec: ModelSpec, cfg: Config, hf_dir: str | Path, *, reader: HfReader | None = None
) -> int:
    """Fill this rank's model chunks from the HF checkpoint in `hf_dir`, reading only its slices. Not collective.

    Needs Megatron's parallel state. Returns the bytes filled. Raises HfCheckpointError for what is wrong on disk,
    ReshardError for a model that is not the map's. `reader`: an open reader to use instead of opening `hf_dir`.
    """
    layouts = chunk_layouts(
        spec,
        tp=cfg.parallel.tensor_model_parallel_size,
        pp=cfg.parallel.pipeline_model_parallel_size,
        vpp=cfg.parallel.virtual_pipeline_model_parallel_size,
        divisible_by=cfg.model.make_vocab_size_divisible_by,
        naming=NAMING[cfg.model.transformer_impl],
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        ep=ps.get_expert_model_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        etp=ps.get_expert_tensor_parallel_world_size(),
        etp_rank=ps.get_expert_tensor_parallel_rank(),
    )
    with contextlib.ExitStack() as stack:
        source = reader or stack.enter_context(HfReader(hf_dir, spec))
        pairs = zip(models, layouts, strict=True)
        return sum(fill_local(local_params(model), layout, source) for model, layout in pairs)
