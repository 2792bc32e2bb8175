"""All contact with vLLM."""
