"""How vLLM is built into the trainer's process: settings, what is checked before, and what is put right after.

    with process_left_alone():
        llm = build(hf_dir, cfg, max_model_len, seed, {})     # collective over all ranks

Traps of vLLM 0.32 on the CPU that this module exists to hide:

- Building it reseeds every global generator, replaces `torch.set_num_threads` by a no-op and overwrites
  LOCAL_WORLD_SIZE and LD_PRELOAD: all restored here.
- Linear weights are repacked at load; with tied embeddings a reload leaves the packed LM head stale, without an
  error (`VllmTarget` packs it again).
- A per-request seed and chunked prefill crash together under runner v1: chunked prefill is off there, so a whole
  sequence must fit into `max_num_batched_tokens`.
- The first sampled token of a process waits for torch.compile, which builds the kernel that counts a token's rank
  (nobody reads it): a second, or many with a cold cache. On the CPU it is counted without (`_count_ranks_eagerly`).
- VLLM_CPU_KVCACHE_SPACE, when set in the environment, wins over `kv_cache_memory_mb`.

On CUDA the same code runs with the GPU's settings (memory by `gpu_memory_utilization`, no LM-head repack); that path
has not been run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from treepo_mega.config import Config, EngineConfig
from treepo_mega.engine import cuda_profile
from treepo_mega.engine.cpu_segments import private_segments
from treepo_mega.engine.expert_parallel import check_expert_parallel, serve_local_experts
from treepo_mega.engine.routing import RoutingNotes, check_routing
from treepo_mega.engine.stream import EngineError
from treepo_mega.engine.vllm_target import VllmTarget
from treepo_mega.modelspec.rotary import check_rotary, engine_rope
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime.device import device, has_cuda

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that the CPU attention kernels of vLLM 0.32 take."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share the cores; the launcher decides about threads
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take the cores from the other ranks
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class WeightSync:
    """Mixed into vLLM's worker (`worker_extension_cls`): `self` is the worker."""

    def weight_target(self) -> VllmTarget:
        """This worker as the destination of a reshard."""
        return VllmTarget(self)

    def note_routing(self, spec: ModelSpec) -> RoutingNotes:
        """Keep from now on what this worker's routers choose."""
        return RoutingNotes(self, spec)

    def scale_logits(self, factor: float) -> float:
        """Multiply the model's logit scale by `factor` and return the old scale. Only for an idle engine."""
        processor = self.model_runner.get_model().logits_processor  # type: ignore[attr-defined]
        old: float = processor.scale
        processor.scale = old * factor
        return old

    def engine_vocab_size(self) -> int:
        """Ids that the LM head can produce."""
        return int(self.model_runner.get_model().logits_processor.org_vocab_size)  # type: ignore[attr-defined]


def check_model(hf_dir: Path, spec: ModelSpec, cfg: Config) -> None:
    """Raises EngineError for a model that this engine cannot hold in the layout of `cfg`, and ModelSpecError for a
    rotation that it would compute otherwise than the actor.
    """
    if not has_cuda() and spec.head_dim not in CPU_HEAD_SIZES:
        raise EngineError(
            f"{hf_dir}: head size {spec.head_dim} is not one that vLLM's CPU kernels take: "
            + ", ".join(map(str, CPU_HEAD_SIZES))
        )
    check_rotary(spec, cfg.max_model_len, f"{hf_dir}/config.json")
    execution = choose_execution(cfg.rollout.engine)
    check_routing(cfg, spec, async_scheduling=execution.async_scheduling, model_runner=execution.model_runner)
    _check_quantization(cfg.rollout.engine.quantization)
    check_expert_parallel(cfg, spec)
    window, tp = spec.max_position_embeddings, cfg.rollout.engine.tensor_parallel_size
    if window and cfg.max_model_len > window:
        raise EngineError(
            f"data.max_prompt_len + rollout.max_response_len = {cfg.max_model_len} exceeds the model's "
            f"{window} positions"
        )
    if tp > 1 and not launched():
        raise EngineError(f"rollout.engine.tensor_parallel_size {tp} needs torch.distributed: start with torchrun")
    if spec.num_attention_heads % tp:
        raise EngineError(
            f"rollout.engine.tensor_parallel_size {tp} does not divide num_attention_heads {spec.num_attention_heads}"
        )


def rotation_overrides(spec: ModelSpec) -> dict[str, Any]:
    """What vLLM is told instead of config.json, so that it rotates as the actor does."""
    return {} if spec.rope_type == "default" else {"rope_parameters": engine_rope(spec)}


def _check_quantization(name: str | None) -> None:
    """Raises EngineError for an FP8 format that vLLM's CPU build has no kernel for. A GPU's own limits vLLM reports."""
    if has_cuda() or name in (None, "fp8_per_channel"):
        return
    if name == "fp8_per_block" and torch.cpu._is_amx_tile_supported():
        return
    why = "it needs a CPU with AMX" if name == "fp8_per_block" else "its quantiser is not in the CPU build"
    raise EngineError(f"rollout.engine.quantization {name} cannot run on this CPU: {why}; use fp8_per_channel")


def launched() -> bool:
    """True on a rank of an initialised torch.distributed job; an engine alone in a process brings its own group."""
    return dist.is_initialized() and "RANK" in os.environ


@contextlib.contextmanager
def process_left_alone() -> Iterator[None]:
    """Undo what building an engine does to the process: generators, thread setter, launcher's environment."""
    names = ("LOCAL_WORLD_SIZE", "LD_PRELOAD")
    before = {name: os.environ.get(name) for name in names}
    set_num_threads, python_state, numpy_state = torch.set_num_threads, random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device()] if has_cuda() else []):
        try:
            yield
        finally:
            # The CPU worker of vLLM 0.32 leaves a function in its place that logs and sets nothing.
            torch.set_num_threads = set_num_threads
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _count_ranks_eagerly() -> None:
    """The same counts as vLLM's compiled `batched_count_greater_than`, of `[B, V]` logprobs, without the compiler."""
    from vllm.v1.sample import sampler

    compiled = sampler.batched_count_greater_than  # an AttributeError here: vLLM moved it, look where it went
    sampler.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)


@dataclass(frozen=True, slots=True)
class Execution:
    """How vLLM runs a step: what `async_scheduling` and `model_runner` of rollout.engine come to on this machine."""

    async_scheduling: bool
    model_runner: str


def choose_execution(engine: EngineConfig) -> Execution:
    """What `auto` chooses: as CUDA has it, or under the engine profile of the environment; else as the CPU has it.

    Raises EngineError for what vLLM's CPU build cannot run.
    """
    profile = cuda_profile.profile()
    asynchronous = has_cuda() or profile != ""
    second = has_cuda() or profile == "cuda"
    chosen = Execution(
        asynchronous if engine.async_scheduling == "auto" else engine.async_scheduling,
        ("v2" if second else "v1") if engine.model_runner == "auto" else engine.model_runner,
    )
    if chosen.async_scheduling and not asynchronous:
        raise EngineError("rollout.engine.async_scheduling true needs CUDA: vLLM's CPU build schedules step by step")
    if chosen.model_runner == "v2" and not second:
        raise EngineError("rollout.engine.model_runner v2 needs CUDA: vLLM's CPU build runs it with no released Triton")
    if engine.cuda_graphs != "none" and not has_cuda():
        raise EngineError(f"rollout.engine.cuda_graphs {engine.cuda_graphs} needs CUDA; none runs everywhere")
    return chosen


def build(
    hf_dir: Path,
    cfg: Config,
    max_model_len: int,
    seed: int,
    overrides: dict[str, Any],
    *,
    weights_follow: bool = False,
) -> Any:
    """vLLM's LLM with the settings that the module docstring explains.

    `overrides` replace keys of config.json. `weights_follow`: whoever builds it writes all weights before the first
    sample, so the checkpoint is not read.
    """
    execution = choose_execution(cfg.rollout.engine)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(execution.model_runner == "v2"))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise EngineError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: the engine lives in the trainer's process")
    # It reports once a process, before its logging has a level, that Triton (our kernels' compiler) has no CPU backend.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    # Applied before vLLM's import, which looks for Triton once.
    cuda_profile.apply()
    from vllm import LLM

    if not has_cuda():
        _count_ranks_eagerly()
        if cfg.rollout.engine.enable_expert_parallel:
            serve_local_experts()
    with private_segments() if launched() and not has_cuda() else contextlib.nullcontext():
        llm = LLM(
            str(hf_dir),
            max_model_len=max_model_len,
            seed=seed,
            hf_overrides=overrides,
            load_format="dummy" if weights_follow else "auto",
            **engine_arguments(cfg, execution, max_model_len),
        )
    check_execution(llm, execution)
    return llm


def engine_arguments(cfg: Config, execution: Execution, max_model_len: int) -> dict[str, Any]:
    """What `rollout.engine` comes to in vLLM's own arguments on this machine."""
    engine = cfg.rollout.engine
    arguments: dict[str, Any] = {
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[engine.dtype or cfg.model.params_dtype],
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enable_expert_parallel": engine.enable_expert_parallel,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": max(engine.max_num_batched_tokens, max_model_len),
        "block_size": engine.block_size,
        "enforce_eager": engine.cuda_graphs == "none",
        "async_scheduling": execution.async_scheduling,
        "quantization": engine.quantization,
        # Runner v1 rewinds a request's generator after a part of a prompt, which a CPU generator cannot. v2 draws by
        # (seed, position), and on CUDA vLLM warns of wrong samples without chunks.
        "enable_chunked_prefill": execution.model_runner == "v2",
        "enable_prefix_caching": True,
        # vLLM's default is before temperature; the loss needs logprobs of the distribution that was sampled from.
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": f"{WeightSync.__module__}.{WeightSync.__qualname__}",
        "enable_sleep_mode": has_cuda(),  # the hand-over of device memory
    }
    if engine.cuda_graphs != "none":
        arguments["compilation_config"] = {"cudagraph_mode": engine.cuda_graphs.upper()}
    if has_cuda():
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = engine.kv_cache_memory_mb << 20
    if cfg.debug.copy_partial_blocks:
        from vllm.config import KVTransferConfig

        from treepo_mega.engine import branch_cache

        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector=branch_cache.BranchCache.__name__,
            kv_connector_module_path=branch_cache.__name__,
            kv_role="kv_consumer",
        )
    if launched():
        arguments["distributed_executor_backend"] = "external_launcher"
    return arguments


def check_execution(llm: Any, wanted: Execution) -> None:
    """Raises EngineError unless `llm` runs as wanted: vLLM reads some settings once a process."""
    core = llm.llm_engine.engine_core.engine_core
    found = Execution(core.async_scheduling, "v2" if llm.llm_engine.vllm_config.use_v2_model_runner else "v1")
    if found != wanted:
        raise EngineError(
            f"vLLM runs with async_scheduling {found.async_scheduling} and model_runner {found.model_runner}, not "
            f"{wanted.async_scheduling} and {wanted.model_runner}: the first engine of a process decides for all"
        )
