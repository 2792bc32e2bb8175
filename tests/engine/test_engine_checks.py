"""What the engine refuses before vLLM is even imported, and where EOS ids come from. No engine is started."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from treepo_mega.checkpoint.hf import HfCheckpointError
from treepo_mega.config import Config, EngineConfig, parse_config
from treepo_mega.data.end_tokens import EndTokenError, find_eos_token_ids
from treepo_mega.engine import cuda_profile, expert_parallel, vllm_setup
from treepo_mega.engine.engine import Engine, EngineError
from treepo_mega.engine.expert_parallel import check_expert_parallel, local_choices
from treepo_mega.engine.routing import check_routing
from treepo_mega.engine.vllm_setup import Execution, choose_execution
from treepo_mega.modelspec.spec import ModelSpec, ModelSpecError
from treepo_mega.runtime.device import has_cuda


def configuration(hf: Path, **rollout: object) -> Config:
    raw = {
        "model": {"hf_checkpoint": str(hf)},
        "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
        "rollout": {"max_response_len": 64, "segment": {"length": 16}, **rollout},
    }
    return parse_config(raw)


def start(hf: Path, **rollout: object) -> Engine:
    return Engine(hf, configuration(hf, **rollout))


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "hf"))


def edit(hf: Path, name: str, **changes: object) -> None:
    path = hf / name
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_missing_or_broken_checkpoint_is_named(copy):
    with pytest.raises(ModelSpecError, match=r"nowhere.*config\.json"):
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
    with pytest.raises(ModelSpecError, match=r"config\.json:2: not valid JSON"):
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


@pytest.mark.skipif(has_cuda(), reason="CUDA runs all of them")
@pytest.mark.parametrize(
    "engine, message",
    [
        ({"async_scheduling": True}, "async_scheduling true needs CUDA"),
        ({"model_runner": "v2"}, "model_runner v2 needs CUDA"),
        ({"cuda_graphs": "piecewise"}, "cuda_graphs piecewise needs CUDA; none runs everywhere"),
    ],
)
def test_what_only_cuda_runs_is_refused_on_a_cpu(copy, monkeypatch, engine, message):
    monkeypatch.delenv(cuda_profile.VARIABLE, raising=False)
    with pytest.raises(EngineError, match=message):
        start(copy, engine=engine)


def test_auto_is_cudas_engine_on_cuda_and_under_its_profile(monkeypatch):
    def chosen(profile: str, **engine: object) -> Execution:
        monkeypatch.setenv(cuda_profile.VARIABLE, profile)
        return choose_execution(EngineConfig(**engine))

    with monkeypatch.context() as patch:
        for module in (vllm_setup, cuda_profile):
            patch.setattr(module, "has_cuda", lambda: True)
        assert chosen("") == Execution(True, "v2")
        assert chosen("", async_scheduling=False, model_runner="v1") == Execution(False, "v1")
    if not has_cuda():
        assert chosen("") == Execution(False, "v1")
        assert chosen("async") == Execution(True, "v1")
        assert chosen("cuda") == Execution(True, "v2")
        assert chosen("cuda", model_runner="v1") == Execution(True, "v1")
    with pytest.raises(EngineError, match=r"TREEPO_ENGINE_PROFILE=cud: expected cuda or async.*did you mean 'cuda'"):
        chosen("cud")


def arguments_on_cuda(hf: Path, monkeypatch: pytest.MonkeyPatch, **engine: object) -> dict[str, object]:
    for module in (vllm_setup, cuda_profile):
        monkeypatch.setattr(module, "has_cuda", lambda: True)
    cfg = configuration(hf, engine=engine)
    return vllm_setup.engine_arguments(cfg, choose_execution(cfg.rollout.engine), 129)


def test_cuda_gets_graphs_sleep_and_chunks(tiny_llama, monkeypatch):
    eager = arguments_on_cuda(tiny_llama, monkeypatch, gpu_memory_utilization=0.85)
    assert eager["enforce_eager"] and "compilation_config" not in eager and eager["enable_sleep_mode"]
    assert eager["gpu_memory_utilization"] == 0.85 and "kv_cache_memory_bytes" not in eager
    assert eager["enable_chunked_prefill"], "v2 draws by (seed, position)"
    assert not arguments_on_cuda(tiny_llama, monkeypatch, model_runner="v1")["enable_chunked_prefill"]
    graphs = arguments_on_cuda(tiny_llama, monkeypatch, cuda_graphs="full_and_piecewise")
    assert not graphs["enforce_eager"] and graphs["compilation_config"] == {"cudagraph_mode": "FULL_AND_PIECEWISE"}
    assert graphs["kv_transfer_config"].kv_connector == "BranchCache", "branch copies stay on beside graphs"


def test_vllm_knows_the_graph_modes_and_the_connector_allows_whole_graphs():
    from vllm.config import CUDAGraphMode

    from treepo_mega.engine.branch_cache import BranchCache

    modes = EngineConfig.model_fields["cuda_graphs"].annotation.__args__
    assert {mode.upper() for mode in modes} <= set(CUDAGraphMode.__members__)
    assert BranchCache.requires_piecewise_for_cudagraph({}) is False


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


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"experts": 0}, "needs a model with experts, and LlamaForCausalLM has none: set it to off"),
        ({"async_scheduling": True}, "set rollout.engine.async_scheduling=false"),
        ({"model_runner": "v2"}, "set rollout.engine.model_runner=v1"),
        ({"cuda_graphs": "piecewise"}, "set rollout.engine.cuda_graphs=none"),
    ],
)
def test_routing_that_cannot_be_read_is_refused(tiny_llama, keys, says):
    spec = dataclasses.replace(ModelSpec.from_hf(tiny_llama), num_experts=keys.get("experts", 8))
    cfg = configuration(tiny_llama, routing_replay="all", engine={"cuda_graphs": keys.get("cuda_graphs", "none")})
    execution = {"async_scheduling": False, "model_runner": "v1"} | {k: v for k, v in keys.items() if k[0] in "am"}
    with pytest.raises(EngineError, match=f"rollout.routing_replay=all.*{says}"):
        check_routing(cfg, spec, **execution)
    check_routing(configuration(tiny_llama), spec, async_scheduling=True, model_runner="v2")


@pytest.mark.parametrize(
    ("experts", "engine", "says"),
    [
        (0, {}, "needs a model with experts, and LlamaForCausalLM has none: leave the key out"),
        (8, {"tensor_parallel_size": 1}, r"needs rollout.engine.tensor_parallel_size > 1 \(nearest: 2\)"),
        (9, {}, "tensor_parallel_size 2 does not divide num_experts 9"),
        (8, {"quantization": "fp8_per_channel"}, "cannot run on this CPU with rollout.engine.quantization fp8_per_ch"),
    ],
)
def test_experts_that_an_engine_cannot_share_out_are_refused(tiny_llama, experts, engine, says, monkeypatch):
    monkeypatch.setattr(expert_parallel, "has_cuda", lambda: False)
    spec = dataclasses.replace(ModelSpec.from_hf(tiny_llama), num_experts=experts)
    keys = {"enable_expert_parallel": True, "tensor_parallel_size": 2} | engine
    with pytest.raises(EngineError, match=f"rollout.engine.enable_expert_parallel.*{says}"):
        check_expert_parallel(configuration(tiny_llama, engine=keys), spec)
    check_expert_parallel(configuration(tiny_llama, engine={**keys, "enable_expert_parallel": False}), spec)


def test_a_rank_computes_its_own_experts_and_adds_nothing_for_others():
    chosen = torch.tensor([[5, 0], [3, 4], [1, 2]], dtype=torch.int32)
    weights = torch.tensor([[0.7, math.inf], [0.5, 0.25], [0.9, 0.1]])
    here = torch.tensor([-1, -1, -1, 0, 1, 2], dtype=torch.int32)
    kept, local = local_choices(weights, chosen, here)
    assert local.tolist() == [[2, 0], [0, 1], [0, 0]] and local.dtype == torch.int32
    assert torch.equal(kept, torch.tensor([[0.7, 0.0], [0.5, 0.25], [0.0, 0.0]]))
