"""The vLLM engine in process, and the generator that drives tree search with it."""
