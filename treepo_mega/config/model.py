"""The policy, its parallel layout, and the way of its weights into the engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from treepo_mega.config.section import Section
from treepo_mega.config.source import expand_path


class ModelConfig(Section):
    """The policy."""

    hf_checkpoint: str
    """Directory with config.json, *.safetensors and the tokenizer (docs/guides/models.md lists architectures)."""
    load: str | None = None
    """Megatron checkpoint with the initial weights; None: read hf_checkpoint. One of this project (treepo-mega convert
    to-mcore), or of Megatron-LM in the format torch_dist: the directory with latest_checkpointed_iteration.txt, or one
    iter_0000100 in it."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Parameter and activation dtype of actor and reference. Optimizer state is always fp32."""
    make_vocab_size_divisible_by: int = Field(128, ge=1)
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size."""
    transformer_impl: Literal["local", "transformer_engine", "auto"] = "local"
    """Modules of the transformer layers: Megatron's own, or Transformer Engine's with norms fused into the linear
    layers (a GPU only; refused elsewhere). auto: Transformer Engine's on a GPU where it loads, else local; the start
    says which. Attention over trees is the same in both."""
    gradient_accumulation_fusion: Literal["auto"] | bool = "auto"
    """Weight gradients are added to their fp32 buffers by the matrix product itself: Apex's kernel (local layers) or
    Transformer Engine's, on a GPU. auto: where the kernel is there. true: refused where it is not."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 products in the transformer layers (Transformer Engine on a GPU; refused elsewhere). hybrid: e5m2 gradients.
    The output layer has its own setting, loss.precision."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8", "delayed"] = "tensorwise"
    """How the layers' operands are scaled (Megatron's names): by tensor, by blocks (Hopper on), by 32 (Blackwell)."""
    first_last_layers_bf16: bool = False
    """With fp8: the first and the last transformer layer stay in bf16."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach the ranks of their experts. alltoall: each goes where its experts are. allgather: all go
    everywhere, for few experts or many of them a token. flex: DeepEP's kernels (a GPU only; refused elsewhere)."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Type of the router's logits and of the weights of a token's experts. None: params_dtype."""
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of each layer's router, added to the policy's mean loss. It is taken over the
    tokens of a micro-batch, a shared one once. What config.json says of it (router_aux_loss_coef) is not read."""
    moe_z_loss_coeff: float | None = Field(None, gt=0)
    """Weight of the mean squared log-sum-exp of the router's logits (ST-MoE), over the same tokens."""

    @field_validator("hf_checkpoint", "load")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return value if value is None else expand_path(value)


class ParallelConfig(Section):
    """Megatron-Core layout; data-parallel size is what is left of the world size."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each matrix (TP). It divides the model's key/value heads; best within a node."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Stages that the layers are divided into (PP), evenly."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline rank (interleaved schedule); None: one chunk."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share the tokens of a micro-batch (CP): for trajectories too long for one rank's activations."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel regions (needs TP > 1; models with experts need it
    with TP > 1)."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the experts of a layer (EP), each holding whole ones: some of the TP, CP and data-parallel ranks
    of a stage. It divides the model's number of experts."""
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    """Ranks that share each matrix of an expert. None: as tensor_model_parallel_size."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while the backward pass still runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations that are computed again in the backward pass instead of kept. full: whole layers, as
    recompute_method says. selective: attention only. None: all are kept."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: uniform recomputes all layers in groups of recompute_num_layers. block: only the first
    recompute_num_layers of a stage."""
    recompute_num_layers: int | None = Field(None, ge=1)
    """Layers of a group (uniform) or of a stage (block)."""

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each matrix of an expert, as it is taken when the key is left out."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP * PP * CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class CanaryConfig(Section):
    """After each refit the engine and the actor score the same fixed random tokens."""

    prompts: int = Field(2, ge=1)
    """Token sequences that engine and actor score after each refit."""
    max_abs_diff: float | None = Field(None, gt=0)
    """Largest difference that one logprob may show between engine and actor, nats. None: 1e-3 when both are fp32, 4
    for a quantised engine, else 2. Equal weights still differ by rounding, for both sum in another order. Measured
    rounding: up to 1.5e-4 in fp32, 0.9 in bf16, 1.5 in FP8."""
    mean_abs_diff: float | None = Field(None, gt=0)
    """Largest mean difference over those tokens, nats. None: 5e-5 when both are fp32, 0.33 for a quantised engine, else
    0.15. The mean tells rounding from a wrong weight where the largest difference cannot. Measured rounding on a
    trained model: up to 6e-6 in fp32, 0.11 in bf16, 0.27 in FP8. One wrong projection, norm or slice of a layer: 0.19
    to 4.6, and 0.39 to 3.0 in FP8, on CPUs with and without AMX."""
    on_failure: Literal["stop", "warn"] = "stop"
    """stop: a difference beyond max_abs_diff or mean_abs_diff ends the run. warn: it is printed and counted."""


class ReshardConfig(Section):
    """Moving weights from the actor into the engine."""

    bucket_mb: int = Field(64, ge=1)
    """Buffers of a refit: what a rank sends and receives in one round, MiB. Two rounds are in flight."""
    canary: CanaryConfig = Field(default_factory=CanaryConfig)
