"""The Megatron-Core actor and reference: model, attention, forward passes, update, checkpoints."""
