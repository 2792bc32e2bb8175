"""The private names of vLLM that `treepo_mega/engine` touches are there and take what they are given. No engine starts.

When this fails after a version bump, `treepo_mega/engine/README.md` says what the name is used for.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import treepo_mega.engine

RELOAD = "vllm.model_executor.model_loader.reload"
FUNCTIONS = {
    f"{RELOAD}.layerwise._layerwise_process": ["layer", "info"],
    f"{RELOAD}.layerwise._place_kernel_tensors": ["layer", "info"],
    f"{RELOAD}.layerwise.get_layerwise_info": ["layer"],
    f"{RELOAD}.layerwise.initialize_online_processing": ["layer"],
    f"{RELOAD}.meta.restore_layer_on_meta": ["layer", "info"],
    f"{RELOAD}.meta.materialize_layer": ["layer", "info"],
    f"{RELOAD}.utils.get_layer_params_buffers": ["layer"],
    "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm": ["layer", "remove_weight"],
    "vllm.v1.core.block_pool.BlockPool._insert_block_hash": ["self", "block_hash_with_group_id", "block", "num_tokens"],
    "vllm.v1.core.kv_cache_utils.make_block_hash_with_group_id": ["block_hash", "group_id"],
    "vllm.v1.worker.utils.copy_kv_cache_blocks_inplace": ["kv_caches", "num_blocks"],
    "vllm.distributed.device_communicators.cpu_communicator._CPUSHMDistributed.make_group_name": ["communicator"],
    "vllm.v1.sample.sampler.batched_count_greater_than": ["x", "values"],
    "vllm.platforms.cpu.CpuPlatform.check_and_update_config": ["vllm_config"],
    "vllm.inputs.engine.tokens_input": ["prompt_token_ids"],
    "vllm.model_executor.layers.fused_moe.router.base_router.BaseRouter.set_capture_fn": ["self", "capture_fn"],
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe.CPUUnquantizedExperts.apply": [
        *("self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation"),
        *("global_num_experts", "expert_map"),
    ],
    "vllm.forward_context.get_forward_context": [],
    "vllm.v1.worker.block_table.BlockTable.get_numpy_array": ["self"],
}
OTHERS = [
    f"{RELOAD}.meta.SKIP_TENSORS",
    "vllm.model_executor.layers.quantization.online.fp8.OnlineLinearBase",
    "vllm.model_executor.layers.quantization.online.fp8.Fp8PerTensorOnlineLinearMethod",
    "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod",
    "vllm.v1.kv_cache_interface.FullAttentionSpec",
    "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner.layer_id",
    "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner.is_monolithic",
]
ATTRIBUTES = {
    "vllm.sampling_params.SamplingParams.clone": "self.skip_clone",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_kv_cache_manager": "_kv_cache_manager",
    "vllm.v1.core.sched.scheduler.Scheduler.__init__": "bind_kv_cache_manager",
    f"{RELOAD}.layerwise._place_kernel_tensors": "kernel_tensors",
    "vllm.model_executor.layers.fused_moe.router.base_router.BaseRouter._select_experts": "self.capture_fn(topk_ids)",
    "vllm.model_executor.layers.fused_moe.modular_kernel.FusedMoEKernelModularImpl._fused_experts": (
        "expert_map=expert_map,"
    ),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model": "slot_mapping=slot_mappings",
    "vllm.v1.worker.gpu_input_batch.InputBatch.__init__": "self.req_id_to_index",
    "vllm.v1.engine.core_client.InprocClient.__init__": "self.engine_core",
    "vllm.v1.engine.core.EngineCore.__init__": "self.batch_queue",
    "vllm.v1.engine.core.EngineCore.step_with_batch_queue": "self.scheduler",
    "vllm.config.VllmConfig.use_v2_model_runner.fget": "VLLM_USE_V2_MODEL_RUNNER",
}


def look_up(dotted: str) -> object:
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert hasattr(found, part), f"vLLM has no {dotted} any more: {part} is missing"
            found = getattr(found, part)
        return found
    raise AssertionError(f"vLLM has no module of {dotted} any more")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_it_is_given(name):
    function = look_up(name)
    function = getattr(function, "_torchdynamo_orig_callable", function)
    expected = FUNCTIONS[name]
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected, name


@pytest.mark.parametrize("name", OTHERS)
def test_a_name_is_there(name):
    assert look_up(name) is not None


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_set_where_it_is_expected(name):
    function = look_up(name)
    assert ATTRIBUTES[name] in inspect.getsource(function), name


def test_the_readme_lists_every_name():
    table = (Path(treepo_mega.engine.__file__).parent / "README.md").read_text(encoding="utf-8")
    names = [name.rpartition(".")[2] for name in FUNCTIONS]
    missing = [name for name in names if name.startswith(("_", "copy_", "dispatch_")) and name not in table]
    assert missing == []
