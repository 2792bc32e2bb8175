"""The two versions of megatron-core that this code runs on, and every place where they differ.

Python 3.11 has megatron-core 0.16.1, its newest; Python 3.12 has 0.19.2. No other file asks for either version
(tests/runtime/test_megatron_versions.py looks). Where they differ, a function here does what its name says on both,
and the reason stands at its branch.

Megatron is imported inside the functions: the check of the environment reads the pins before anything heavy loads.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PINS = {(3, 11): "0.16.1", (3, 12): "0.19.2"}
"""Python -> its megatron-core, as setup.py has them."""
TRITON = "triton==3.8.0"
"""What setup.py installs beside torch's CPU build; the build for CUDA brings its own."""


def environment_problems() -> list[str]:
    """What is wrong with the installed megatron-core, each a sentence that says what to do; metadata alone is read."""
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return []
    python = sys.version_info[:2]
    wanted = PINS.get(python, PINS[max(PINS)])
    if found != wanted:
        return [
            f"megatron-core {found} is installed, and on Python {'.'.join(map(str, python))} this project runs with "
            f"{wanted}: run `pip install megatron-core=={wanted}` (`make setup` chooses it)"
        ]
    # 0.19.2: models.gpt -> transformer.moe.paged_stash -> `import triton`, unguarded, for a model without experts too.
    if _is_later() and importlib.util.find_spec("triton") is None:
        return [f"megatron-core {found} imports triton for every model, and it is missing: run `pip install {TRITON}`"]
    return []


@functools.cache
def _is_later() -> bool:
    """Is the later of the two installed?"""
    return metadata.version("megatron-core") == PINS[3, 12]


def mark_shard(weight: Tensor, dim: int) -> None:
    """Tell Megatron that `weight` is this rank's shard along `dim` of a tensor-parallel matrix.

    Raises RuntimeError for a weight that is marked otherwise.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not _is_later():
        # 0.16.1 marks a weight only when it also initialises it, which would cost the full matrix.
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
        return
    # 0.19.2 marks it in both cases, a gated layer with the stride 2, and refuses to mark it twice.
    marks = [getattr(weight, name, None) for name in ("tensor_model_parallel", "partition_dim")]
    if marks != [True, dim]:
        raise RuntimeError(f"megatron-core marked a shard along {dim} as (parallel, dim) {tuple(marks)}")


def mlp_submodules(layer: Any) -> Any:
    """The modules of the MLP in the spec of a layer, dense or with experts; changed in place, the spec has others."""
    # 0.16.1 has a ModuleSpec there, as in all places of a layer. 0.19.2 has a partial of the MLP's class.
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if _is_later() else mlp.submodules


def own_async_writer() -> dict[str, str]:
    """Arguments of `dist_checkpointing.save` by which a write in the background is Megatron's own."""
    # 0.19.2 would ask for nvidia-resiliency-ext; 0.16.1 has no choice, and does not know the argument.
    return {"async_strategy": "mcore"} if _is_later() else {}


def complete_checkpoint(directory: Path) -> None:
    """Let both versions load the checkpoint just saved in `directory`. One rank calls it, when all have written."""
    # What is not sharded (the optimizer's groups, the trainer's state): 0.16.1 keeps it in common.pt, and finds no
    # other. 0.19.2 puts it into the sharded files, and reads common.pt first where there is one.
    if not _is_later():
        return
    import torch
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    torch.save(load_common_state_dict(directory), directory / "common.pt")
