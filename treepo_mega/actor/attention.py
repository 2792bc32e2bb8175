"""Attention over a pack: each query sees its own ancestors and nothing else.

The visibility rule is the pack's intervals (`tree/pack.py`): key j is visible to query i iff
j <= i < subtree_end[j]. `attention_cpu.py` and `attention_flex.py` compute it, one per device; this file is what
Megatron calls.

Megatron hands `attention_mask` down to core attention. The argument carries a *handle*, a one-element integer tensor,
and the pack's layout waits in a registry under that number:

    handle = PACKS.add(PackLayout.build(pack, device))
    model(tokens, positions, attention_mask=handle)

The handles of a pipeline schedule stay registered until its last backward is done (`PackRegistry.clear`).

Context parallelism: queries stay where they are; keys and values of all ranks of the group are gathered and put
into pack order, and their gradients are summed back to the owners (a reduce-scatter).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from treepo_mega.actor import attention_cpu, attention_flex
from treepo_mega.runtime.staging import staged
from treepo_mega.tree.pack import Pack


@dataclass(slots=True)
class PackLayout:
    """What attention needs to know of a pack, on the device of the model."""

    kernel: attention_cpu.CpuLayout | attention_flex.FlexLayout
    order: Tensor | None = None
    """[T] where each token of the pack lies among the gathered ones (context parallelism)."""

    @classmethod
    def build(cls, pack: Pack, device: torch.device) -> PackLayout:
        """The layout for this rank's queries of `pack`, for the kernel of `device`."""
        order = None if pack.order is None else staged(pack.order, device)
        if device.type == "cpu":
            return cls(attention_cpu.CpuLayout.build(pack.subtree_end, pack.blocks, pack.local), order)
        return cls(attention_flex.FlexLayout.build(pack.subtree_end, device, pack.local), order)


@dataclass(slots=True)
class PackRegistry:
    """Layouts by handle; one per process, emptied when a pipeline schedule ends."""

    layouts: dict[int, PackLayout] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def add(self, layout: PackLayout) -> Tensor:
        """Register `layout`; returns its handle, a CPU int64 tensor [1] to pass as `attention_mask`."""
        # No number comes twice: a handle from an ended schedule must fail, not find another pack.
        number = next(self.numbers)
        self.layouts[number] = layout
        # A tensor, because Megatron's recomputation keeps its arguments with `save_for_backward`.
        # On the CPU, because reading a number from a GPU would wait for the device in every layer.
        return torch.tensor([number])

    def get(self, handle: Tensor) -> PackLayout:
        """The layout behind a handle. Raises RuntimeError when its schedule has ended."""
        try:
            return self.layouts[int(handle)]
        except KeyError:
            raise RuntimeError(f"pack {int(handle)} is no longer registered: its pipeline schedule has ended") from None

    def clear(self) -> None:
        """Forget all layouts."""
        self.layouts.clear()


# A registry and not a current pack: Megatron recomputes layers in the backward pass, by which time another micro-batch
# may be current.
PACKS = PackRegistry()


class GatherTokens(torch.autograd.Function):
    """[n, ...] of each rank of `group` -> [n * ranks, ...], in rank order; backward sums gradients to the owners."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """One all-gather over `group`."""
        ctx.group = group
        out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """One reduce-scatter over `group`."""
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float | None) -> Tensor:
    """Exact attention: query [Q, H, D] of this rank, key and value [T, G, D] of the pack -> [Q, H, D]."""
    if isinstance(layout.kernel, attention_cpu.CpuLayout):
        return attention_cpu.attend(query, key, value, layout.kernel, scale)
    return attention_flex.attend(query, key, value, layout.kernel, scale)


class PackAttention(MegatronModule):
    """Megatron core attention for packs: [Q, 1, H/tp, D] queries, the handle of a PackLayout as mask."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """-> [Q, 1, (H/tp) * D]. Positional and keyword extras of Megatron (mask type, bias, packing) do not apply."""
        layout = PACKS.get(attention_mask)
        query = query[:, 0]
        key = key[:, 0]
        value = value[:, 0]
        if self.cp_group is not None:
            # One collective for keys and values; gathered tokens lie by rank, `order` puts them into pack order.
            both = GatherTokens.apply(torch.cat((key, value), -1), self.cp_group)
            key, value = both.index_select(0, layout.order).split(key.shape[-1], -1)
        return attend(query, key, value, layout, self.scale).flatten(1)[:, None]
