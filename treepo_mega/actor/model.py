"""The policy as Megatron-Core chunks, built from a Hugging Face configuration.

`PolicyModel` is Megatron's GPTModel with two changes: rotary angles come from the pack's positions instead
of the row number, and the last stage returns hidden states, because `loss/head.py` turns them into
logprobs without the [T, V] logits that GPTModel would make. What its layers are made of: `layers.py`.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from treepo_mega.actor.fusions import fused_operations
from treepo_mega.actor.layers import fuse_weight_gradients, gradient_fusion, layer_spec
from treepo_mega.actor.moe import expert_fields, forget_dispatch, gathers_tokens, set_auxiliary
from treepo_mega.config import Config
from treepo_mega.loss import te
from treepo_mega.modelspec.mcore_layout import ModelSpec, padded_vocab
from treepo_mega.modelspec.rotary import attention_factor, check_rotary, long_factors
from treepo_mega.runtime.device import device, has_cuda
from treepo_mega.runtime.megatron_versions import mark_shard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PolicyModel(GPTModel):
    """GPTModel that rotates by `position_ids` and returns hidden states [T, 1, K] on its last stage.

    Under sequence parallelism the hidden states are this rank's slice [T/tp, 1, K].
    """

    inv_freq: Tensor
    unpadded_vocab_size: int

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        out = list(super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs))
        angles = position_ids[0].float()[:, None] * self.inv_freq
        # Place 1 of Megatron's tuple holds the rotary angles. Twice: Hugging Face rotates halves, not neighbours.
        out[1] = torch.cat((angles, angles), dim=-1)[:, None, None, :]  # [T, 1, 1, D]
        return tuple(out)

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows [V/tp, K] of the output matrix (the embedding when tied)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(cfg: Config, spec: ModelSpec) -> TransformerConfig:
    """Megatron's configuration for this model and layout. Raises RuntimeError while `transformer_impl` is auto."""
    impl = cfg.model.transformer_impl
    if impl == "auto":
        raise RuntimeError("model.transformer_impl is still auto: call runtime.dist.choose_layers first")
    p, dtype = cfg.parallel, DTYPES[cfg.model.params_dtype]
    pp = p.pipeline_model_parallel_size
    # With two stages the next and the previous rank are the same peer, and batched point-to-point
    # operations of the interleaved schedule pair up wrongly, silently (gradient norm off by 1000x).
    separate_p2p = pp == 2 and p.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_key_value_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_model_parallel_size,
        context_parallel_size=p.context_parallel_size,
        sequence_parallel=p.sequence_parallel,
        # Packs have lengths of their own, but where all must be of one (`equal_lengths`).
        variable_seq_lengths=pp > 1 and not equal_lengths(cfg),
        overlap_p2p_comm=separate_p2p,
        batch_p2p_comm=not separate_p2p,
        recompute_granularity=p.recompute_granularity,
        recompute_method=p.recompute_method,
        recompute_num_layers=p.recompute_num_layers,
        # Else Megatron averages micro-batches and data-parallel ranks alike, and packs hold unequal numbers of pairs.
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not has_cuda(),
        perform_initialization=False,
        gradient_accumulation_fusion=gradient_fusion(cfg.model) == "apex",
        transformer_impl=impl,
        finalize_model_grads_func=finalize_model_grads,
        **expert_fields(cfg, spec),
        **fused_operations(impl, on_gpu=has_cuda(), rotation_factor=attention_factor(spec)),
        **te.body_fields(cfg.model),
    )


def equal_lengths(cfg: Config) -> bool:
    """Whether all packs of a step on a rank must be of one length: the interleaved schedule's buffers have one size."""
    return cfg.parallel.virtual_pipeline_model_parallel_size is not None or gathers_tokens(cfg)


def rope_inverse_frequencies(spec: ModelSpec, longest: int) -> Tensor:
    """Rotary inverse frequencies [head_dim / 2] as transformers computes them, for trajectories of `longest` tokens.

    Raises ModelSpecError for rotary parameters that actor and engine would not compute alike.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    check_rotary(spec, longest)
    if spec.rope_type == "default":
        steps = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
        return 1.0 / (spec.rope_theta**steps)
    # What the function reads of a configuration is the same for every architecture.
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings or 2048,
        rope_parameters={"rope_type": spec.rope_type, "rope_theta": spec.rope_theta, **spec.rope_scaling},
    )
    length = longest if long_factors(spec, longest) else None
    inv_freq, _ = ROPE_INIT_FUNCTIONS[spec.rope_type](config, torch.device("cpu"), seq_len=length)
    return inv_freq


def scale_rotation(config: TransformerConfig, factor: float) -> None:
    """Let Megatron's attention multiply cosines and sines by `factor`, through its settings for YaRN."""
    # Megatron multiplies by 0.1 * mscale * ln(scaling) + 1, which for scaling e**10 is mscale + 1.
    config.yarn_rotary_scaling_factor = math.exp(10)
    config.yarn_mscale, config.yarn_mscale_all_dim = factor - 1, 0.0


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Tell Megatron which weights are shards. Unmarked ones count as duplicates, and the gradient norm misses all but
    rank 0's.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            mark_shard(module.weight, dim=0)
        elif isinstance(module, RowParallelLinear):
            mark_shard(module.weight, dim=1)


def build_model(cfg: Config, spec: ModelSpec) -> list[PolicyModel]:
    """This rank's model chunks (one, or one per virtual stage), uninitialised weights, on this rank's device.

    Needs Megatron's parallel state. Padded vocabulary rows are part of the embedding and output shards.
    """
    config = transformer_config(cfg, spec)
    p = cfg.parallel
    vpp = p.virtual_pipeline_model_parallel_size
    vocab = padded_vocab(spec, cfg.model.make_vocab_size_divisible_by, p.tensor_model_parallel_size)
    inv_freq = rope_inverse_frequencies(spec, cfg.max_model_len).to(device())
    scale_rotation(config, attention_factor(spec))
    logging.getLogger("megatron").setLevel(logging.WARNING)
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = stage if vpp else None
        model = PolicyModel(
            config=config,
            transformer_layer_spec=layer_spec(config, cfg.model, vp_stage),
            vocab_size=vocab,
            max_sequence_length=cfg.max_model_len,
            pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=spec.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        model.inv_freq, model.unpadded_vocab_size = inv_freq, spec.vocab_size
        mark_tensor_parallel(model)
        set_auxiliary([model], cfg.model)
        forget_dispatch([model])
        if gradient_fusion(cfg.model) == "transformer_engine":
            fuse_weight_gradients(model)
        chunks.append(model.to(device()))
    return chunks
