"""Helpers: tiny checkpoints made by transformers, and programs run on several ranks with a deadline."""

from pathlib import Path

import pytest

from tests.world import run_world


def _tiny(directory, kind, *, tied=False, vocab=301, dtype=None, layers=4, **more):
    """A random checkpoint of `kind` ("llama", "qwen2", "qwen3") in `directory`; biases and norms are not trivial."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=128,
        initializer_range=0.2,  # logits of order 1, so that a wrong weight shows
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.1 + (1 if "norm" in name else 0))
    model.save_pretrained(directory, **more)
    return Path(directory)


@pytest.fixture
def tiny_hf(tmp_path):
    """Maker of tiny checkpoints: tiny_hf("qwen2", tied=True) -> directory."""

    def make(kind="llama", name="hf", **options):
        return _tiny(tmp_path / name, kind, **options)

    return make


def _run_ranks(n, script, *args, timeout=120):
    code, out, failure = run_world(n, [str(script), *map(str, args)], timeout)
    if "did not end within" in failure:
        pytest.fail(f"{script} on {n} ranks: {failure}\n{out[-4000:]}", pytrace=False)
    return code, out


@pytest.fixture
def run_ranks():
    """run_ranks(n, script, *args, timeout=120) -> (exit code, output); fails the test at the deadline."""
    return _run_ranks
