"""Trees of token segments: data, search, credit, packing. Pure Python: no torch.distributed, vLLM or megatron."""
