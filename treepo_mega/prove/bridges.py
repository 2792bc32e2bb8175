"""What stands between the trainer and fake tensors, each bridge with its reason. Nothing else is replaced.

    with bridged(world):
        ...                            # build and run rank `world.rank` of `world.size`

Fake tensors have shapes and no bytes, and the fake process group answers every collective at once without moving any.
So a place that reads a number out of a tensor, or asks for a group that talks for real, needs a bridge.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads, param_and_grad_buffer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from treepo_mega.actor import attention, layers, model, update
from treepo_mega.actor.fusions import fused_operations
from treepo_mega.config import ParallelConfig
from treepo_mega.loss.shard import Shard
from treepo_mega.prove import experts
from treepo_mega.tree.pack import Pack


@dataclass(frozen=True, slots=True)
class FakeWorld:
    """A rank of a cluster that is not there. `shape`: of what pipeline stages hand on, [T, 1, K] or [T/tp, 1, K]."""

    rank: int
    size: int
    ranks_per_node: int
    parallel: ParallelConfig
    shape: tuple[int, int, int]


class OneCall(torch.autograd.Function):
    """Attention as one call that keeps and makes what the GPU's kernel does, and computes nothing."""

    # The CPU's own attention is thousands of small calls a layer: minutes of bookkeeping for fake tensors, and its
    # temporaries are not those of a GPU.

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [Q, H, D], key and value [T, G, D] -> [Q, H, D]; kept are the inputs, the output and fp32 [Q, H]."""
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sum = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the three inputs, beside one fp32 number for each query and head."""
        query, key, value, _, log_sum = ctx.saved_tensors
        delta = torch.empty_like(log_sum)
        parts = (query, key, value)
        made = tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts)
        del delta
        return made


class OneNorm(torch.autograd.Function):
    """RMSNorm as one call that keeps and makes what the GPU's kernel does, and computes nothing."""

    # Torch's CPU norm is many operations, whose fp32 results autograd keeps.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., K] -> the same; kept are x, the weight and an fp32 number for each row."""
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of both inputs."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: object, scale: float | None) -> Tensor:
    return OneCall.apply(query, key, value)


def _layout(pack: Pack, device: torch.device) -> attention.PackLayout:
    order = None if pack.order is None else torch.from_numpy(pack.order)
    return attention.PackLayout(None, order)  # type: ignore[arg-type]  # `_attend` asks for none


def _only_layout(registry: attention.PackRegistry, handle: Tensor) -> attention.PackLayout:
    return next(iter(registry.layouts.values()))


def _everyone_says_the_same(out: list[Any], value: Any, group: Any = None) -> None:
    for index in range(len(out)):
        out[index] = value


class _Done:
    """The handle of a collective that is over."""

    def wait(self) -> None:
        """It is over."""


@contextlib.contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[_Done]:
    yield _Done()


def _finalize(chunks: list[Any], num_tokens: Tensor | None = None, **how: Any) -> None:
    finalize_model_grads(chunks, None, **how)
    for chunk in chunks:
        chunk.scale_gradients(1.0)


def _owned(shard: Shard, target: Tensor) -> tuple[Tensor, Tensor]:
    local = target - shard.first
    return (local >= 0) & (local < shard.valid), local.clamp(0, max(shard.valid - 1, 0))


def _patches(world: FakeWorld) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, stand-in) of every bridge."""
    # Pickles a Python object into bytes and reads those of other ranks: there are none.
    yield dist, "all_gather_object", _everyone_says_the_same
    # Compares the generators' states byte by byte when it leaves; nothing random is drawn in these passes.
    yield megatron_random.CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext()
    # Fake parameters cannot be swapped for those of another device, and are on the right one.
    yield model.PolicyModel, "to", lambda self, *args, **kwargs: self
    # A GPU's layers fuse what keeps activations; the passes here are to keep the same ones.
    yield model, "fused_operations", lambda impl, **how: fused_operations(impl, **{**how, "on_gpu": True})
    # There are no weights to read: shapes are all that counts.
    yield update, "load_from_hf", lambda *args, **kwargs: None
    # See OneCall.
    yield attention, "attend", _attend
    yield attention.PackLayout, "build", _layout
    # See OneNorm.
    yield layers.RMSNorm, "forward", lambda norm, x: OneNorm.apply(x, norm.weight)
    # The handle's number is a byte of a fake tensor. Layouts are alike here, so any of them will do.
    yield attention.PackRegistry, "get", _only_layout
    # Reads whether every target is a token; they are.
    yield Shard, "owned", _owned
    # Joins the collectives of buckets into an operation that fake tensors do not know.
    yield param_and_grad_buffer, "_coalescing_manager", _one_by_one
    # Divides by a number of pairs only where it is above 0, which it reads.
    yield update, "finalize_model_grads", _finalize
    # Which experts a token takes is not in a fake tensor: each is taken equally often.
    yield from experts.patches()
    # Stages tell each other the length of a pack in a tensor. Here all packs have one length.
    yield P2PCommunicator, "_communicate_shapes", lambda *args: (list(world.shape), list(world.shape))


@contextlib.contextmanager
def bridged(world: FakeWorld) -> Iterator[None]:
    """Process groups and Megatron's parallel state of `world`, and every bridge. Undone at the end."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    launch = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.rank % world.ranks_per_node,
        "LOCAL_WORLD_SIZE": min(world.ranks_per_node, world.size),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {key: str(value) for key, value in launch.items()}))
        dist.init_process_group("fake", rank=world.rank, world_size=world.size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        parallel = world.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        stack.callback(parallel_state.destroy_model_parallel)
        # The optimizer asks for gloo groups, which connect to real peers: the fake ones stand for them.
        for name in [name for name in vars(parallel_state) if name.endswith("_GLOO")]:
            if getattr(parallel_state, name) is None:
                real = getattr(parallel_state, name.removesuffix("_GLOO"), None)
                setattr(parallel_state, name, real or parallel_state._DATA_PARALLEL_GROUP)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        for target, attribute, stand_in in _patches(world):
            stack.enter_context(mock.patch.object(target, attribute, stand_in))
        yield
