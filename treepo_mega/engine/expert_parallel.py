"""An engine whose ranks hold whole experts: what it needs, and what vLLM's CPU kernel lacks for it.

    check_expert_parallel(cfg, spec)      # before building
    serve_local_experts()                 # on a CPU, before the engine's first pass

Under `rollout.engine.enable_expert_parallel` each of TP_v ranks holds num_experts / TP_v neighbouring experts. All
ranks see all tokens and route them alike. Each computes what its own experts add, and the all-reduce that sums slices
of experts otherwise sums these.

vLLM 0.32 hands its kernels the numbers of all experts and a map to the rank's own. The CPU's kernel takes the numbers
without the map, and they point past the end of its table of experts. So the numbers are mapped before it is called. A
choice that lives on another rank goes to the first local expert with weight 0: it adds exactly nothing, and is computed
all the same. So on a CPU a rank multiplies TP_v times as much for experts as with slices of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from treepo_mega.config import Config
from treepo_mega.engine.stream import EngineError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime.device import has_cuda

KEY = "rollout.engine.enable_expert_parallel"


def check_expert_parallel(cfg: Config, spec: ModelSpec) -> None:
    """Raise EngineError where the key is set and this engine could not share the model's experts out."""
    engine = cfg.rollout.engine
    if not engine.enable_expert_parallel:
        return
    tp = engine.tensor_parallel_size
    if not spec.num_experts:
        raise EngineError(f"{KEY} needs a model with experts, and {spec.architecture} has none: leave the key out")
    if tp == 1:
        raise EngineError(f"{KEY} needs rollout.engine.tensor_parallel_size > 1 (nearest: 2)")
    if spec.num_experts % tp:
        raise EngineError(
            f"{KEY}: rollout.engine.tensor_parallel_size {tp} does not divide num_experts {spec.num_experts}"
        )
    if engine.quantization and not has_cuda():
        raise EngineError(
            f"{KEY} cannot run on this CPU with rollout.engine.quantization {engine.quantization}: only the kernel of "
            "unquantised experts is given the rank's own; leave one of the two keys out"
        )


def local_choices(weights: Tensor, chosen: Tensor, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the rank's own experts: fp32 [n, top_k] and int32 [n, top_k], contiguous.

    `expert_map` [experts] int32 is the place of each expert on this rank, -1: not here. Those get weight 0.
    """
    local = expert_map[chosen.long()]
    here = local >= 0
    # Chosen, and no product: a router's weight of another rank's expert could be infinite or no number.
    kept = torch.where(here, weights, torch.zeros_like(weights))
    return kept.contiguous(), local.clamp(min=0).to(torch.int32).contiguous()


def serve_local_experts() -> None:
    """Let the CPU's kernel of unquantised experts be called with the rank's own numbers, from now on."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernels: Any = CPUUnquantizedExperts
    kernel = kernels.apply
    if hasattr(kernel, "__wrapped__"):
        return

    @functools.wraps(kernel)
    def apply(experts: Any, **given: Any) -> None:
        if given["expert_map"] is not None:
            if given["apply_router_weight_on_input"]:
                raise EngineError(f"{KEY} cannot run on a CPU: this model's kernel leaves the router's weights out")
            weights, chosen = local_choices(given["topk_weights"], given["topk_ids"], given["expert_map"])
            given |= {"topk_weights": weights, "topk_ids": chosen, "expert_map": None}
        kernel(experts, **given)

    kernels.apply = apply
