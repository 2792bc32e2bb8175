"""What of the trainer's memory can be handed over: Megatron's buffers and the optimizer's state, by part.

    Handover(handover_backend(actor, engine_bytes, sleep_level), offload=("grads", "optimizer"))

Parts are those of `sync/handover.py`. Storages that also hold parameters (the fp32 optimizer's main parameters are
views of them) belong to "params" alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from treepo_mega.engine import cuda_profile
from treepo_mega.runtime.device import has_cuda
from treepo_mega.sync.handover import PARTS, Bookkeeping, DeviceMemory


def part_tensors(actor: Any, part: str) -> list[Tensor]:
    """The tensors of one of PARTS, each storage once. `actor` has Megatron's DDP `chunks` and its `optimizer`."""
    params = {p.untyped_storage().data_ptr(): p for chunk in actor.chunks for p in chunk.parameters()}
    if part == "params":
        return list(params.values())
    found = _gradients(actor) if part == "grads" else _optimizer_state(actor.optimizer)
    once = {t.untyped_storage().data_ptr(): t for t in found}
    return [t for pointer, t in once.items() if pointer not in params and t.numel()]


def _gradients(actor: Any) -> Iterator[Tensor]:
    for chunk in actor.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            yield buffer.grad_data


def _optimizer_state(optimizer: Any) -> Iterator[Tensor]:
    for o in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(o, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor) and v.dim())


def handover_backend(actor: Any, engine_bytes: dict[str, int], sleep_level: int) -> DeviceMemory | Bookkeeping:
    """Real memory on CUDA and under an engine profile; else, on the CPU, the books, with the sizes of the same tensors.

    `engine_bytes`: "weights" and "kv_cache", for the books.
    """
    if has_cuda() or cuda_profile.profile():
        return DeviceMemory(lambda part: part_tensors(actor, part), level=sleep_level)
    sizes = {part: sum(t.untyped_storage().nbytes() for t in part_tensors(actor, part)) for part in PARTS}
    return Bookkeeping(sizes | engine_bytes)
