"""Llama 2 and 3, SmolLM2 and others that say LlamaForCausalLM."""

from treepo_mega.modelspec.architectures import Architecture

ARCHITECTURE = Architecture("LlamaForCausalLM")
