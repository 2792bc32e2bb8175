"""Attention over a pack: each query sees its own ancestors and nothing else.

The visibility rule is the pack's intervals (`tree/pack.py`): key j is visible to query i iff
j <= i < subtree_end[j]. Blocks (trees) do not see each other, so a dense T x T mask is never built:
blocks of the pack are gathered into padded batches [B, L] of at most `MASK_ELEMENTS` mask entries, each
attended exactly with scaled_dot_product_attention, and scattered back. Memory is linear in T for blocks of
bounded length. A batch whose blocks are all single paths uses the causal kernel and no mask at all.

How the mask gets here. Megatron hands `attention_mask` down to core attention, also when it recomputes a
layer in the backward pass, by which time another micro-batch may be current. So the argument carries a
*handle*, a one-element integer tensor, and the pack's layout waits in a registry under that number:

    with pack_context(layout) as handle:
        model(tokens, positions, attention_mask=handle)

The handles of a pipeline schedule stay registered until its last backward is done (`PackRegistry.clear`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treepo_mega.runtime import cpu_megatron

cpu_megatron.install()

from megatron.core.transformer.module import MegatronModule  # noqa: E402

MASK_ELEMENTS = 1 << 24
"""Largest B * L * L of one batch of blocks: 16 Mi boolean entries."""


@dataclass(slots=True)
class BlockBatch:
    """Blocks attended together. index [B, L]: pack positions, padded by repeating the block's last token."""

    index: Tensor
    inside: Tensor
    """[B, L] bool: True where `index` is a token of the block and not padding."""
    mask: Tensor | None
    """[B, 1, L, L] bool, True = visible; None: plain causal attention is exact."""


@dataclass(slots=True)
class PackLayout:
    """What attention needs to know of a pack, on the device of the model."""

    length: int
    batches: list[BlockBatch]

    @classmethod
    def build(
        cls, length: int, blocks: list[tuple[int, int]], subtree_end: np.ndarray, device: torch.device
    ) -> PackLayout:
        """Group blocks of similar size; padding tokens after the last block form a block of their own."""
        spans = list(blocks)
        covered = spans[-1][1] if spans else 0
        if covered < length:
            spans.append((covered, length))
        spans.sort(key=lambda b: b[0] - b[1])
        batches, at = [], 0
        while at < len(spans):
            width = spans[at][1] - spans[at][0]
            rows = max(1, MASK_ELEMENTS // (width * width))
            group = [b for b in spans[at : at + rows] if 2 * (b[1] - b[0]) >= width]
            batches.append(_batch(group, width, subtree_end, device))
            at += len(group)
        return cls(length, batches)


def _batch(group: list[tuple[int, int]], width: int, subtree_end: np.ndarray, device: torch.device) -> BlockBatch:
    start = np.array([b[0] for b in group])[:, None]
    end = np.array([b[1] for b in group])[:, None]
    raw = start + np.arange(width)[None]
    index, inside = np.minimum(raw, end - 1), raw < end
    single_path = all((subtree_end[s:e] == e).all() for s, e in group)
    # Padding keys lie behind every real query of their block, so the causal mask alone hides them.
    mask = None
    if not single_path:
        keys_end = np.where(inside, subtree_end[index], raw + 1)
        visible = (raw[:, None, :] <= raw[:, :, None]) & (raw[:, :, None] < keys_end[:, None, :])
        mask = torch.from_numpy(visible[:, None]).to(device)
    return BlockBatch(torch.from_numpy(index).to(device), torch.from_numpy(inside).to(device), mask)


@dataclass(slots=True)
class PackRegistry:
    """Layouts by handle; one per process, emptied when a pipeline schedule ends."""

    layouts: dict[int, PackLayout] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def add(self, layout: PackLayout) -> Tensor:
        """Register `layout`; returns its handle, a CPU int64 tensor [1] to pass as `attention_mask`."""
        number = next(self.numbers)
        self.layouts[number] = layout
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


PACKS = PackRegistry()


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float | None) -> Tensor:
    """Exact attention over a pack. query [T, H, D], key and value [T, G, D] (G divides H) -> [T, H, D]."""
    out = torch.zeros_like(query)
    for b in layout.batches:
        q, k, v = (t[b.index].transpose(1, 2) for t in (query, key, value))
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=b.mask, is_causal=b.mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        out = out.index_put((b.index[b.inside],), o.transpose(1, 2)[b.inside])
    return out


class PackAttention(MegatronModule):
    """Megatron core attention for packs: [T, 1, H/tp, D] queries, the handle of a PackLayout as mask."""

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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """-> [T, 1, (H/tp) * D]. Positional and keyword extras of Megatron (mask type, bias, packing) do not apply."""
        out = attend(query[:, 0], key[:, 0], value[:, 0], PACKS.get(attention_mask), self.scale)
        return out.flatten(1)[:, None]
