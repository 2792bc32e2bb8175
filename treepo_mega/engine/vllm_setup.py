"""How vLLM is built into the trainer's process: settings, what is checked before, and what is put right after.

    with process_left_alone():
        llm = build(hf_dir, cfg, max_model_len, seed)     # collective over all ranks

Traps of vLLM 0.32 on the CPU that this module exists to hide:

- Building it reseeds every global generator, replaces `torch.set_num_threads` by a no-op and overwrites
  LOCAL_WORLD_SIZE and LD_PRELOAD: all restored here.
- Linear weights are repacked at load; with tied embeddings a reload leaves the packed LM head stale, without an
  error (`VllmTarget` packs it again).
- A per-request seed and chunked prefill crash together: chunked prefill is off, so a whole sequence must fit into
  `max_num_batched_tokens`.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from treepo_mega.config import Config
from treepo_mega.engine.stream import EngineError
from treepo_mega.engine.vllm_target import VllmTarget
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

    def scale_logits(self, factor: float) -> float:
        """Multiply the model's logit scale by `factor` and return the old scale. Only for an idle engine."""
        processor = self.model_runner.get_model().logits_processor  # type: ignore[attr-defined]
        old: float = processor.scale
        processor.scale = old * factor
        return old

    def engine_vocab_size(self) -> int:
        """Ids that the LM head can produce."""
        return int(self.model_runner.get_model().logits_processor.org_vocab_size)  # type: ignore[attr-defined]


def check_model(hf_dir: Path, hf: dict[str, Any], cfg: Config) -> None:
    """Raises EngineError for a model (config.json `hf`) that this engine cannot hold in the layout of `cfg`."""
    head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    if not has_cuda() and head not in CPU_HEAD_SIZES:
        raise EngineError(
            f"{hf_dir}: head size {head} is not one that vLLM's CPU kernels take: {', '.join(map(str, CPU_HEAD_SIZES))}"
        )
    _check_quantization(cfg.rollout.engine.quantization)
    window, tp = hf.get("max_position_embeddings"), cfg.rollout.engine.tensor_parallel_size
    if window and cfg.max_model_len > window:
        raise EngineError(
            f"data.max_prompt_len + rollout.max_response_len = {cfg.max_model_len} exceeds the model's "
            f"{window} positions"
        )
    if tp > 1 and not launched():
        raise EngineError(f"rollout.engine.tensor_parallel_size {tp} needs torch.distributed: start with torchrun")
    if hf["num_attention_heads"] % tp:
        raise EngineError(
            f"rollout.engine.tensor_parallel_size {tp} does not divide num_attention_heads {hf['num_attention_heads']}"
        )


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


def build(hf_dir: Path, cfg: Config, max_model_len: int, seed: int) -> Any:
    """vLLM's LLM with the settings that the module docstring explains."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise EngineError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: the engine lives in the trainer's process")
    # It reports once a process, before its logging has a level, that Triton (our kernels' compiler) has no CPU backend.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    from vllm import LLM

    if not has_cuda():
        _count_ranks_eagerly()
    e = cfg.rollout.engine
    more: dict[str, Any] = (
        {"gpu_memory_utilization": e.gpu_memory_utilization}
        if has_cuda()
        else {"kv_cache_memory_bytes": e.kv_cache_memory_mb << 20}
    )
    if cfg.debug.copy_partial_blocks:
        from vllm.config import KVTransferConfig

        from treepo_mega.engine import branch_cache

        more["kv_transfer_config"] = KVTransferConfig(
            kv_connector=branch_cache.BranchCache.__name__,
            kv_connector_module_path=branch_cache.__name__,
            kv_role="kv_consumer",
        )
    if launched():
        more["distributed_executor_backend"] = "external_launcher"
    return LLM(
        str(hf_dir),
        dtype={"fp32": "float32", "bf16": "bfloat16"}[e.dtype or cfg.model.params_dtype],
        tensor_parallel_size=e.tensor_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=e.max_num_seqs,
        max_num_batched_tokens=max(e.max_num_batched_tokens, max_model_len),
        block_size=e.block_size,
        enforce_eager=e.enforce_eager,
        quantization=e.quantization,
        enable_chunked_prefill=False,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        worker_extension_cls=f"{WeightSync.__module__}.{WeightSync.__qualname__}",
        seed=seed,
        enable_sleep_mode=has_cuda(),  # the hand-over of device memory
        **more,
    )
