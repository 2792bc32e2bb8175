"""Shared fixtures: a random-weight Hugging Face checkpoint small enough to start engines and models from.

    def test_x(tiny_llama: Path): ...                  # tied embeddings, 2 layers, fp32
    def test_y(make_tiny_llama): make_tiny_llama(tie_word_embeddings=False, num_hidden_layers=4)

The directory holds what a real checkpoint holds: config.json, generation_config.json, model.safetensors and a
tokenizer (`tokenizer.json`, one id per symbol, so that text <-> ids is a bijection on what it knows).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is first imported: several OpenMP threads on shared cores cost far more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests import world
from tests.groups import make_scheduler, need_engines, sort_by_group
from tests.hf_fixtures import run_ranks, tiny_hf
from tests.properties import register_profiles
from tests.shards import keep_shard, parse_shard
from tests.starts import count_children

__all__ = ["run_ranks", "tiny_hf"]

count_children()
register_profiles()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shard 1/3`: the first of three parts of the tests, for machines that share a lane."""
    parser.addoption("--shard", type=parse_shard, metavar="I/N", help="only the I-th of N parts of the test files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort groups in the processes that xdist starts; a single process keeps the order of the files."""
    if (shard := config.getoption("shard")) is not None:
        keep_shard(config, items, shard)
    if need_engines(items):
        world.PRELOAD.append("tests.engine_imports")
    if hasattr(config, "workerinput"):
        sort_by_group(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups of groups.py for `--dist loadgroup`; xdist's own schedulers for its other words."""
    return make_scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


if os.environ.get("TREEPO_ENGINE_PROFILE"):
    from treepo_mega.engine import cuda_profile

    # Before a test module imports vLLM, which looks for Triton only then.
    cuda_profile.apply()

TINY_SYMBOLS = [
    "<pad>",
    "<bos>",
    "<eos>",
    *"0123456789",
    *"+-*/=;:,.?() ",
    "\\boxed{",
    "}",
    *"abcdefghijklmnopqrstuvwxyz",
]
"""The fixture's vocabulary, in id order: pad 0, bos 1, eos 2."""

MakeTiny = Callable[..., Path]


def write_tiny_tokenizer(directory: Path, symbols: list[str]) -> None:
    """A tokenizer with one id per symbol; decoding puts nothing between symbols."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tok.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def make_tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """A function that writes a tiny Llama (hidden 64, 4 heads, 2 KV heads, head_dim 32, fp32) and returns its path.

    Keyword arguments: `tie_word_embeddings` (True), `num_hidden_layers` (2), `seed` (0), and any other
    LlamaConfig field. Equal arguments give the same directory: do not write into it.
    """
    made: dict[tuple[tuple[str, object], ...], Path] = {}

    def make(*, seed: int = 0, **fields: object) -> Path:
        key = tuple(sorted({"seed": seed, **fields}.items()))
        if key not in made:
            made[key] = _write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"), seed, fields)
        return made[key]

    return make


@pytest.fixture(scope="session")
def keep_alive() -> list[object]:
    """Append every engine to it: deleting one tears down the process groups of all others in this process."""
    return []


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_llama: MakeTiny) -> Path:
    """The default tiny Llama: tied embeddings, 2 layers."""
    return make_tiny_llama()


def _write_tiny_llama(directory: Path, seed: int, fields: dict[str, object]) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, object] = {
        "vocab_size": len(TINY_SYMBOLS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # large enough that next-token distributions are far from uniform
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**values, **fields}))
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory, TINY_SYMBOLS)
    return directory
