"""What a run's checkpoints take, before any is written. That a real one has this size: test_mcore.py."""

from pathlib import Path

import pytest

from treepo_mega.checkpoint.space import checkpoint_bytes, planned_bytes
from treepo_mega.config import Config, load_config
from treepo_mega.modelspec.mcore_layout import ModelSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", hidden_size=64, num_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, intermediate_size=96, vocab_size=83, tie_word_embeddings=True,
)  # fmt: skip
WEIGHTS = 4 * (64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 96 + 2 * 64) + 64
"""All but the embedding."""


def configure(run_dir: Path, *overrides: str) -> Config:
    base = ["model.hf_checkpoint=m", "data.train=[{path: t}]", f"logging.run_dir={run_dir}"]
    return load_config(None, [*base, "model.make_vocab_size_divisible_by=8", *overrides])


@pytest.mark.parametrize(
    "overrides, bytes_a_parameter",
    [
        ([], 16),
        (["model.params_dtype=bf16"], 14),
        (["parallel.use_distributed_optimizer=false"], 12),
        (["model.params_dtype=bf16", "parallel.use_distributed_optimizer=false"], 14),
    ],
)
def test_a_checkpoint_has_weights_master_weights_and_moments(tmp_path, overrides, bytes_a_parameter):
    assert checkpoint_bytes(configure(tmp_path, *overrides), SPEC) == (WEIGHTS + 88 * 64) * bytes_a_parameter
    two = configure(tmp_path, *overrides, "parallel.tensor_model_parallel_size=2")
    assert checkpoint_bytes(two, SPEC) == (WEIGHTS + 96 * 64) * bytes_a_parameter, "the vocabulary is padded for TP"


def test_the_plan_counts_what_stands_together(tmp_path):
    def copies(*overrides: str) -> float:
        cfg = configure(tmp_path, "train.num_rollouts=100", "checkpoint.keep_last=2", *overrides)
        return planned_bytes(cfg, SPEC)[tmp_path / "checkpoints"] / checkpoint_bytes(cfg, SPEC)

    assert copies() == 3, "two stay, and the next is written before the oldest goes"
    assert copies("checkpoint.save_interval=60") == 2
    assert copies("checkpoint.save_interval=1000") == 1
    assert copies("checkpoint.keep_every=20") == 3 + 4, "20, 40, 60 and 80 stay for good"
    (tmp_path / "checkpoints/step_000010").mkdir(parents=True)
    assert copies() == 2, "one is there already"
    assert copies("checkpoint.load=null") == 3, "a run that begins anew sets it aside"


def test_the_export_counts_and_a_run_that_saves_nothing_needs_nothing(tmp_path):
    cfg = configure(tmp_path, "checkpoint.enabled=false")
    assert planned_bytes(cfg, SPEC) == {}
    cfg = configure(tmp_path, "checkpoint.enabled=false", "checkpoint.save_hf=true", "model.params_dtype=bf16")
    assert planned_bytes(cfg, SPEC) == {tmp_path / "hf": (WEIGHTS + 83 * 64) * 2}
