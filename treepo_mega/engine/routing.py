"""The experts that the engine chose, kept beside its KV cache: a row a slot, so that cached tokens keep theirs.

    notes = RoutingNotes(worker)                    # hooks into the routers of the worker's model
    notes.read("17", 0, 40)                         # [40, layers, top_k] of a request that has just been computed

vLLM's own option (`enable_return_routed_experts`) is wired to model runner V2 alone and to requests that have ended;
its routers' hook (`set_capture_fn`), by which that option works, is used here directly. The hook is called in every
layer of every forward pass. The forward context says which KV slot each token has, and the slot's row takes its
experts. A prefix that is found in the cache, from whichever request, therefore has the experts that it was computed
with, and so has a block that `branch_cache.py` copies: `copy` copies its rows.

A request's rows are read right after the step that computed them, by its block table in the worker. So steps must not
overlap (`check_routing`). Ranks of a tensor-parallel engine route alike: each notes all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treepo_mega.config import Config
from treepo_mega.engine.stream import EngineError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.tree.routing import Experts, dtype_of

GROUP = 0
"""The only KV cache group of a model whose layers all attend to everything."""
ATTRIBUTE = "noted_routing"
"""Where a layer of vLLM's model has the notes, for `branch_cache.py`."""


def check_routing(cfg: Config, spec: ModelSpec, *, async_scheduling: bool, model_runner: str) -> None:
    """Raise EngineError where `rollout.routing_replay` is set and this engine could not return what it routed."""
    mode = cfg.rollout.routing_replay
    if mode == "off":
        return
    where = f"rollout.routing_replay={mode}"
    if not spec.num_experts:
        raise EngineError(f"{where} needs a model with experts, and {spec.architecture} has none: set it to off")
    if async_scheduling:
        raise EngineError(f"{where} reads routing between steps: set rollout.engine.async_scheduling=false")
    if model_runner != "v1":
        raise EngineError(f"{where} reads vLLM's model runner v1: set rollout.engine.model_runner=v1")
    if cfg.rollout.engine.cuda_graphs != "none":
        raise EngineError(f"{where} looks into every layer: set rollout.engine.cuda_graphs=none")


class RoutingNotes:
    """What the routers of one worker's model chose, by KV slot."""

    def __init__(self, worker: Any, spec: ModelSpec) -> None:
        """Hook into the routers. Raises EngineError when a layer with experts has none that can be asked."""
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        self._runner = worker.model_runner
        config = self._runner.vllm_config.cache_config
        self._block_size = int(config.block_size)
        self._dtype = dtype_of(spec.num_experts)
        slots = int(config.num_gpu_blocks) * self._block_size
        # One row more than slots: padding has slot -1, and writes there.
        self._rows = torch.zeros(
            (slots + 1, spec.num_layers, spec.experts_per_token), dtype=torch.int16, device=self._runner.device
        )
        runners = [module for module in self._runner.get_model().modules() if isinstance(module, MoERunner)]
        asked = [module for module in runners if not module.is_monolithic and isinstance(module.router, BaseRouter)]
        if len(asked) != spec.num_layers:
            raise EngineError(
                f"the engine returns no routing: of {spec.num_layers} layers with experts {len(asked)} have a router "
                "that can be asked (vLLM fuses choice and computation in the others). Set rollout.routing_replay=off"
            )
        for module in asked:
            module.router.set_capture_fn(partial(self._note, int(module.layer_id)))
            setattr(module, ATTRIBUTE, self)

    def _note(self, layer: int, chosen: Tensor) -> None:
        """Keep what a layer's router chose for the tokens of this pass, [n, top_k]."""
        from vllm.forward_context import get_forward_context

        slots_of_layer = get_forward_context().slot_mapping
        # vLLM's warm-up passes have no slots.
        if not slots_of_layer:
            return
        if not isinstance(slots_of_layer, dict):
            raise EngineError("rollout.routing_replay cannot read a pass in two halves (vLLM's dual batch overlap)")
        slots = next(iter(slots_of_layer.values()))
        if len(slots) < len(chosen):
            raise EngineError(
                f"layer {layer} of the engine routed {len(chosen)} tokens where {len(slots)} have a KV slot: "
                "rollout.routing_replay needs an engine whose ranks route all of their own tokens"
            )
        self._rows[slots[: len(chosen)], layer] = chosen.to(torch.int16)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the rows of whole blocks (from, to), as their keys and values are copied."""
        by_block = self._rows[:-1].view(-1, self._block_size, *self._rows.shape[1:])
        # All sources are read before anything is written: a block may be both.
        by_block[[to for _, to in pairs]] = by_block[[source for source, _ in pairs]]

    def read(self, request: str, begin: int, end: int) -> Experts:
        """Experts of the places `begin` .. `end` - 1 of a request that the last step computed.

        Raises EngineError for a request that it did not.
        """
        batch = self._runner.input_batch
        name = next((known for known in batch.req_id_to_index if known.partition("-")[0] == request), None)
        if name is None:
            raise EngineError(f"the engine returned no routing for request {request}: its last step did not compute it")
        table = batch.block_table[GROUP]
        size = int(table.block_size)
        place = np.arange(begin, end)
        blocks = table.get_numpy_array()[batch.req_id_to_index[name]]
        slots = blocks[place // size].astype(np.int64) * size + place % size
        rows = self._rows[torch.from_numpy(slots).to(self._rows.device)]
        return Experts(rows.cpu().numpy().astype(self._dtype))
