"""What a transformer layer is made of, and where its weight gradients are added up.

`model.transformer_impl` is Megatron's name for the choice of modules:

    local                 Megatron's own linear modules with our RMSNorm; any device
    transformer_engine    Megatron's spec of Transformer Engine modules, a norm fused into the linear layer after it;
                          a GPU only. The norms have other names then (`linear_qkv.layer_norm_weight`), which
                          `modelspec/mcore_layout.py` knows as naming "te"

In both the core attention is ours (`attention.py`).
`model.fp8` puts Transformer Engine's linear modules into the local layer (`loss/te.py`), under local names.

`model.gradient_accumulation_fusion` lets the matrix product of a weight's gradient add to Megatron's fp32 buffer
itself, instead of into a tensor that is added afterwards. Megatron's linear modules do so with a kernel of Apex
(`fused_weight_gradient_mlp_cuda`), Transformer Engine's with their own product.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from treepo_mega.actor.attention import PackAttention
from treepo_mega.actor.moe import PackRouter
from treepo_mega.config import ConfigError, ModelConfig
from treepo_mega.loss import te
from treepo_mega.runtime.device import has_cuda
from treepo_mega.runtime.megatron_versions import mlp_submodules

APEX_KERNEL = "fused_weight_gradient_mlp_cuda"


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension; under sequence parallelism its gradient is summed over TP."""

    # Our own, because Megatron's torch norm refuses sequence parallelism.

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of parameters with this mark over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return F.rms_norm(x, (self.weight.shape[0],), self.weight, self.eps)


def layer_spec(config: TransformerConfig, model: ModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this stage and their final norm. Raises ConfigError where Transformer Engine cannot run."""
    if model.transformer_impl == "transformer_engine":
        layer, norm = _te_layer(config)
    else:
        layer = _local_layer(config)
        norm = RMSNorm
    # No module of Transformer Engine knows what a tree's token sees.
    layer.submodules.self_attention.submodules.core_attention = PackAttention
    if config.num_moe_experts:
        mlp_submodules(layer).router = PackRouter
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=layer.module, submodules=layer.submodules) for _ in range(count)],
        layer_norm=norm,
    )


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # Megatron's map of names in checkpoints takes this norm for part of a dense MLP, as Transformer Engine's layers
        # with experts do not.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    if config.fp8:
        te.use_te_linears(layer)
    # Without these norms Megatron's spec has IdentityOp in both places, and that must stay.
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _te_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    te.transformer_engine("model.transformer_impl=transformer_engine", "use model.transformer_impl=local")
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    return layer, gpt_layer_specs.TESpecProvider().layer_norm(rms_norm=True)


def gradient_fusion(model: ModelConfig) -> Literal["apex", "transformer_engine"] | None:
    """Whose kernel adds the layers' weight gradients to their buffers; None: they are added afterwards.

    Raises ConfigError with the reason where `model.gradient_accumulation_fusion` is asked for and cannot be had.
    """
    asked = model.gradient_accumulation_fusion
    if asked is False:
        return None
    missing = None if has_cuda() else "torch sees no GPU here"
    kernel: Literal["apex", "transformer_engine"] = "apex"
    if model.fp8 or model.transformer_impl == "transformer_engine":
        # The layers themselves report when it is absent.
        kernel = "transformer_engine"
    elif missing is None:
        missing = _apex_is_missing()
    if missing is None:
        return kernel
    if asked is True:
        raise ConfigError(
            f"model.gradient_accumulation_fusion=true cannot run: {missing}; auto uses it where it can, false never"
        )
    return None


def _apex_is_missing() -> str | None:
    try:
        importlib.import_module(APEX_KERNEL)
    # OSError: built for another torch or CUDA.
    except (ImportError, OSError) as e:
        return (
            f"the local layers need Apex's kernel {APEX_KERNEL}, which does not load ({type(e).__name__}: {e}); build "
            "Apex with --cuda_ext, or use model.transformer_impl=transformer_engine, which has its own"
        )
    return None


def fuse_weight_gradients(chunk: torch.nn.Module) -> int:
    """Tell Transformer Engine's linear modules of a model chunk to add to `main_grad`; returns how many there are.

    Raises RuntimeError when there is none: the version of Transformer Engine then calls its switch otherwise.
    """
    # Megatron's configuration has one switch for both kinds. With it on, Megatron refuses to build any linear module of
    # its own without Apex, among them the output layer, which is never called here (`loss/head.py` takes its weight).
    # So the switch stays off, and Transformer Engine's modules are told one by one.
    linears: list[Any] = [candidate for candidate in chunk.modules() if hasattr(candidate, "fuse_wgrad_accumulation")]
    if not linears:
        raise RuntimeError(
            "no layer has Transformer Engine's switch fuse_wgrad_accumulation; set "
            "model.gradient_accumulation_fusion=false"
        )
    for module in linears:
        module.fuse_wgrad_accumulation = True
    return len(linears)
