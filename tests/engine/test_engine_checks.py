"""What the engine refuses before vLLM is even imported, and where EOS ids come from. No engine is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from treepo_mega.checkpoint.hf import HfCheckpointError
from treepo_mega.config import ConfigError, parse_config
from treepo_mega.data.end_tokens import EndTokenError, find_eos_token_ids
from treepo_mega.engine.engine import Engine, EngineError
from treepo_mega.runtime.device import has_cuda


def start(hf: Path, **rollout: object) -> Engine:
    raw = {
        "model": {"hf_checkpoint": str(hf)},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
        "rollout": {"max_response_len": 64, "segment": {"length": 16}, **rollout},
    }
    return Engine(hf, parse_config(raw))


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "hf"))


def edit(hf: Path, name: str, **changes: object) -> None:
    path = hf / name
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_missing_or_broken_checkpoint_is_named(copy):
    with pytest.raises(ConfigError, match=r"nowhere.*config\.json"):
        start(copy / "nowhere")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(HfCheckpointError, match=r"model-00001-of-00002.*no such file"):
        start(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(HfCheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        start(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(HfCheckpointError, match=r"expected model\.safetensors or .*found no weights"):
        start(copy)
    (copy / "config.json").write_text('{\n"vocab_size": }')
    with pytest.raises(ConfigError, match=r"config\.json:2: not valid JSON"):
        start(copy)


@pytest.mark.skipif(has_cuda(), reason="the CPU kernels' head sizes do not bind on CUDA")
def test_a_head_size_without_a_kernel_is_refused(copy):
    edit(copy, "config.json", head_dim=24)
    with pytest.raises(EngineError, match=r"head size 24 .*32, 64"):
        start(copy)


def test_a_window_or_layout_that_does_not_fit_is_refused(copy, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EngineError, match="= 664 exceeds the model's 512 positions"):
        start(copy, max_response_len=600)
    with pytest.raises(EngineError, match="start with torchrun"):
        start(copy, engine={"tensor_parallel_size": 2})


def test_multiprocessing_mode_is_refused(copy, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(EngineError, match="must be 0"):
        start(copy)


def test_eos_ids_are_the_union_of_all_places_int_or_list(copy):
    tokenizer = SimpleNamespace(eos_token_id=9)
    assert find_eos_token_ids(copy) == [2]
    edit(copy, "generation_config.json", eos_token_id=[7, 2])
    assert find_eos_token_ids(copy, tokenizer) == [7, 2, 9]


def test_no_eos_anywhere_is_an_error(copy):
    edit(copy, "generation_config.json", eos_token_id=None)
    edit(copy, "config.json", eos_token_id=None)
    with pytest.raises(EndTokenError, match="no EOS token"):
        find_eos_token_ids(copy, SimpleNamespace(eos_token_id=None))
