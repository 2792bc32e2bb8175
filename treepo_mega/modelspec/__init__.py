"""What a model is, and where each tensor lies in Hugging Face files, Megatron and vLLM. Pure."""
