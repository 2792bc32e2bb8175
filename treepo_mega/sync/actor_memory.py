"""What of the trainer's memory can be handed over: Megatron's buffers and the optimizer's state, by part.

    Handover(handover_backend(actor, engine_bytes, sleep_level), offload=("grads", "optimizer"))

Parts are those of `sync/handover.py`. Each storage belongs to one part:

>>> import torch
>>> from types import SimpleNamespace as Fake
>>> weight = torch.nn.Parameter(torch.ones(4))
>>> adam = torch.optim.Adam([weight])
>>> weight.sum().backward()
>>> adam.step()
>>> buffer = Fake(grad_data=torch.zeros(4))
>>> chunk = Fake(parameters=lambda: [weight], buffers=[buffer], expert_parallel_buffers=[])
>>> actor = Fake(chunks=[chunk], optimizer=Fake(optimizer=adam))
>>> [(part, len(part_tensors(actor, part))) for part in ("grads", "optimizer", "params")]
[('grads', 1), ('optimizer', 2), ('params', 1)]

The optimizer has two moments here. Its main parameter is the fp32 parameter itself, so it counts as "params" alone.
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
    params = {param.untyped_storage().data_ptr(): param for chunk in actor.chunks for param in chunk.parameters()}
    if part == "params":
        return list(params.values())
    found = _gradients(actor) if part == "grads" else _optimizer_state(actor.optimizer)
    once = {tensor.untyped_storage().data_ptr(): tensor for tensor in found}
    # Main parameters of an fp32 optimizer are views of the parameters: offloading them would take the weights along.
    return [tensor for pointer, tensor in once.items() if pointer not in params and tensor.numel()]


def _gradients(actor: Any) -> Iterator[Tensor]:
    for chunk in actor.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            yield buffer.grad_data


def _optimizer_state(optimizer: Any) -> Iterator[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Megatron's optimizer of a rank without parameters wraps None.
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            # Adam's step counter is a scalar, which is not worth a transfer.
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def handover_backend(actor: Any, engine_bytes: dict[str, int], sleep_level: int) -> DeviceMemory | Bookkeeping:
    """Real memory on CUDA and under an engine profile; else, on the CPU, the books, with the sizes of the same tensors.

    `engine_bytes`: "weights" and "kv_cache", for the books.
    """
    if has_cuda() or cuda_profile.profile():
        return DeviceMemory(lambda part: part_tensors(actor, part), level=sleep_level)
    sizes = {part: sum(tensor.untyped_storage().nbytes() for tensor in part_tensors(actor, part)) for part in PARTS}
    return Bookkeeping(sizes | engine_bytes)
