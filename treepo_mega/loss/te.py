"""Transformer Engine: FP8 in the transformer layers, and its quantiser and products for the head. CUDA only.

Transformer Engine does not run without a GPU, and does not install beside a CPU build of torch. So nothing here is
imported before it is asked for. Asked for where it cannot run, it is an error with the reason.

Layers: `model.fp8`, `model.fp8_recipe` and `model.first_last_layers_bf16` become Megatron's own fields
(`body_fields`); the layers' four linear modules become Transformer Engine's (`use_te_linears`), which keep the names
and shapes of the weights, so that resharding and checkpoints do not notice. Megatron enters the FP8 context around
each layer. The output layer is outside of it, always: the head's precision is loss.precision.

Head: `gradient_products` are its cuBLASLt products for dHidden and dWeight, with the split accumulator that a sum
over a vocabulary needs on Hopper.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from treepo_mega.config import ConfigError, ModelConfig
from treepo_mega.runtime.device import has_cuda
from treepo_mega.runtime.megatron_versions import mlp_submodules

PROBES = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""Megatron's recipe -> transformer_engine.pytorch's question whether this GPU can."""


ON_A_CPU = "leave model.fp8 unset; loss.precision=fp8 runs there by emulation (loss.backend=torch)"


def transformer_engine(asked_by: str, on_a_cpu: str = ON_A_CPU) -> Any:
    """The module transformer_engine.pytorch. Raises ConfigError with the reason when it cannot be used here, and with
    what to do on a CPU instead."""
    if not has_cuda():
        raise ConfigError(
            f"{asked_by} needs Transformer Engine on a GPU, and torch sees none here. On a CPU {on_a_cpu}"
        )
    try:
        return importlib.import_module("transformer_engine.pytorch")
    # OSError: a library of it is missing, or was built for another torch.
    except (ImportError, OSError) as e:
        raise ConfigError(
            f"{asked_by} needs Transformer Engine, which does not load ({type(e).__name__}: {e}). Install it with "
            "`pip install --no-build-isolation -e .[te]` beside a CUDA build of torch"
        ) from None


def row_multiple(model: ModelConfig) -> int:
    """FP8 layers take numbers of tokens that are multiples of this."""
    if model.fp8 is None:
        return 1
    return 32 if model.fp8_recipe == "mxfp8" else 16


def body_fields(model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for FP8 layers, none without `model.fp8`.

    Raises ConfigError where FP8 layers cannot run: no GPU, no Transformer Engine, or a GPU without this recipe.
    """
    if model.fp8 is None:
        return {}
    te = transformer_engine(f"model.fp8={model.fp8}")
    # Megatron by itself accepts fp8='hybrid' without Transformer Engine, and trains in bf16 without a word.
    available, reason = getattr(te, PROBES[model.fp8_recipe])(return_reason=True)
    if not available:
        raise ConfigError(f"model.fp8_recipe={model.fp8_recipe} cannot run on this GPU: {reason}")
    return {
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe,
        "first_last_layers_bf16": model.first_last_layers_bf16,
    }


def use_te_linears(layer: Any) -> None:
    """Replace the linear modules of a Megatron local layer spec by Transformer Engine's unfused ones, in place."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    attention = layer.submodules.self_attention.submodules
    mlp = mlp_submodules(layer)
    attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = TERowParallelLinear


def gradient_products(dz: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(dz @ weight [N, K] in fp32, dz^T @ hidden [V, K] in fp32) as FP8 products of cuBLASLt.

    dz [N, V] (e5m2), weight [V, K] and hidden [N, K] (e4m3), all bf16 here and quantised per tensor. The products take
    multiples of 16 in every direction: zeros are appended and cut off again.
    """
    te = transformer_engine("loss.fp8_grads")
    # After transformer_engine.pytorch: that package loads the library that this module is made of.
    tex = importlib.import_module("transformer_engine_torch")
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm
    count, vocabulary = dz.shape
    width = hidden.shape[1]

    def both_ways(operand: Tensor, kind: Any) -> Any:
        rows, columns = operand.shape
        # cuBLASLt takes multiples of 16 in every direction; zeros add nothing to a product.
        operand = torch.nn.functional.pad(operand, (0, -columns % 16, 0, -rows % 16)).contiguous()
        return te.Float8CurrentScalingQuantizer(fp8_dtype=kind, device=operand.device, rowwise=True, columnwise=True)(
            operand
        )

    dz8 = both_ways(dz, tex.DType.kFloat8E5M2)
    w8, h8 = (both_ways(operand, tex.DType.kFloat8E4M3) for operand in (weight, hidden))
    # Hopper's fp8 accumulator is short: a sum over a vocabulary needs the split one.
    how = {"out_dtype": torch.float32, "grad": True, "use_split_accumulator": True}
    # Column-major conventions of cuBLAS: NN is dz @ W, NT is dz^T @ hidden.
    d_hidden = gemm(w8, dz8, layout="NN", **how)[0]
    d_weight = gemm(h8, dz8, layout="NT", **how)[0]
    return d_hidden[:count, :width], d_weight[:vocabulary, :width]
