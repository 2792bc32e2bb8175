"""Hugging Face checkpoints to Megatron and back, proven: `treepo-mega convert`."""

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference allowed between the logits of Megatron and of transformers, in fp32 arithmetic."""
