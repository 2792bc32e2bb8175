"""Which of Megatron's fused operations a layer takes: those that cost nothing and need no Apex.

    operation    local, on a GPU                        Transformer Engine's layers             on a CPU
    RMSNorm      torch's kernel (`layers.RMSNorm`)      inside the linear module after it       torch's own
    SwiGLU       compiled: one kernel each way          the same                                three operations
    RoPE         five operations                        its kernel, one each way                five operations

None of these is a matter of Apex: its norm kernels of Megatron know LayerNorm alone, and its masked softmax belongs to
an attention that is not ours. `docs/guides/gpu.md` says what is left out, and why.
"""

from __future__ import annotations

from treepo_mega.runtime.layer_modules import Impl


def fused_operations(impl: Impl, *, on_gpu: bool, rotation_factor: float = 1.0) -> dict[str, bool]:
    """Fields of Megatron's TransformerConfig that switch fused operations on or off; every one that it has.

    `rotation_factor` is what cosines and sines are multiplied by (`modelspec.rotary.attention_factor`).
    """
    return {
        # Through torch.compile, which makes a second length dynamic: no graph a pack length.
        "bias_activation_fusion": on_gpu,
        # Transformer Engine's kernel knows no factor: Megatron would warn at every call and rotate unfused.
        "apply_rope_fusion": on_gpu and impl == "transformer_engine" and rotation_factor == 1.0,
        # It asserts where it cannot run, and models with norms of queries and keys are such a case.
        "fused_single_qkv_rope": False,
        # One alternative to the compiled activation; Megatron takes either.
        "use_te_activation_func": False,
        # Without biases and dropout an addition alone is left: one kernel already.
        "bias_dropout_fusion": False,
        # Both belong to modules that are not here: Megatron's own attention, Apex's LayerNorm.
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
