"""Hugging Face checkpoints to Megatron and back, proven."""
