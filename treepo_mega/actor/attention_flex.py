"""Tree attention on CUDA: FlexAttention with a BlockMask made from the pack's intervals.

The mask function is the pack's rule, `kv <= q < subtree_end[kv]`; under context parallelism q is first translated
from this rank's queries to pack indices. Which 128 x 128 blocks are empty, partial or full follows from the
intervals' extremes per block, in (T/128)^2 time and without a T x T mask. Lengths are padded to `SHAPE_BUCKET`.

The compiled kernel takes any length: it is compiled for each kind of pass, not for each pack. Where torch would fall
back to dense T x T scores, `attend` raises AttentionError.

Padding tokens see themselves. Checked on the CPU against the dense mask (tests/actor/test_attention_flex.py);
the compiled kernel and its backward need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from treepo_mega.errors import TreepoError
from treepo_mega.runtime.staging import staged

BLOCK = 128
SHAPE_BUCKET = 512
"""Pack lengths on CUDA are multiples of this: no block of the mask is partly padding, and packs waste few tokens."""
COMPILED_VARIANTS = 16
"""Graphs of one process, at most. Three passes differ in their gradients; the first length may cost each its own."""


def mask_function(subtree_end: Tensor, local: Tensor | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod(b, h, q, kv)` for a pack; `local` [Q] translates queries (None: they are all here)."""
    if local is None:
        return lambda b, h, q, kv: (kv <= q) & (q < subtree_end[kv])
    return lambda b, h, q, kv: (kv <= local[q]) & (local[q] < subtree_end[kv])


def block_visibility(
    subtree_end: np.ndarray, local: np.ndarray | None, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """(some, all) [query blocks, key blocks] bool: blocks with a visible pair, and blocks of nothing else.

    `some` may hold blocks without one where a query block is not contiguous in the pack: it is only slower then.
    """
    length = len(subtree_end)
    own = np.arange(length) if local is None else local
    key_at = np.arange(0, length, block)
    query_at = np.arange(0, len(own), block)
    latest = np.maximum.reduceat(subtree_end, key_at)
    soonest = np.minimum.reduceat(subtree_end, key_at)
    last_key = np.minimum(key_at + block, length) - 1
    first = own[query_at]
    last = own[np.minimum(query_at + block, len(own)) - 1]
    some = (key_at[None] <= last[:, None]) & (latest[None] > first[:, None])
    full = (last_key[None] <= first[:, None]) & (soonest[None] > last[:, None])
    # The kernel skips the mask in a full block, so a block cut short by the end of the pack is never full.
    whole = (np.minimum(query_at + block, len(own)) - query_at == block)[:, None] & (last_key - key_at == block - 1)
    return some, full & whole


@dataclass(slots=True)
class FlexLayout:
    """A pack's BlockMask on the device."""

    mask: BlockMask

    @classmethod
    def build(
        cls, subtree_end: np.ndarray, device: torch.device, local: np.ndarray | None = None, block: int = BLOCK
    ) -> FlexLayout:
        """`local`: pack indices of this rank's queries, ascending (None: all)."""
        some, full = block_visibility(subtree_end, local, block)
        partial = some & ~full
        # BlockMask wants the numbers of the visible blocks first in each row; a stable sort keeps them ascending.
        tensors = []
        for blocks in (partial, full):
            index = np.argsort(~blocks, axis=1, kind="stable")
            tensors += [staged(numbers, device, torch.int32)[None, None] for numbers in (blocks.sum(1), index)]
        end = staged(subtree_end, device)
        own = None if local is None else staged(local, device)
        queries = len(subtree_end) if local is None else len(local)
        mask = BlockMask.from_kv_blocks(
            tensors[0],
            tensors[1],
            tensors[2],
            tensors[3],
            BLOCK_SIZE=block,
            mask_mod=mask_function(end, own),
            seq_lengths=(queries, len(subtree_end)),
        )
        return cls(mask)


class AttentionError(TreepoError):
    """The compiled attention cannot serve a pass without dense scores."""


def compiled_attention(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """`flex_attention` compiled for any length; torch raises FailOnRecompileLimitHit after COMPILED_VARIANTS graphs.

    `backend` is torch.compile's: a test counts the graphs with its own.
    """
    # Without fullgraph torch answers the limit with dense scores: T x T of fp32 a head, and only a warning.
    # The limit is this function's own: vLLM compiles the same flex_attention in this process.
    return torch.compile(  # type: ignore[call-overload]  # the overloads of 2.13 leave out two of its arguments
        flex_attention,
        dynamic=True,
        fullgraph=True,
        backend=backend,
        recompile_limit=COMPILED_VARIANTS,
        isolate_recompiles=True,
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    return compiled_attention()


def attend(query: Tensor, key: Tensor, value: Tensor, layout: FlexLayout, scale: float | None) -> Tensor:
    """Exact attention over a pack: query [Q, H, D], key and value [T, G, D] (G divides H) -> [Q, H, D].

    Raises AttentionError when the pass needs one more compiled variant than COMPILED_VARIANTS.
    """
    # Not at the top: it loads torch's compiler, seconds that a process on a CPU never needs.
    from torch._dynamo.exc import FailOnRecompileLimitHit

    heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    try:
        out = _compiled()(*heads_first, block_mask=layout.mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    except FailOnRecompileLimitHit:
        gradients = "with" if torch.is_grad_enabled() else "without"
        raise AttentionError(
            f"tree attention already has {COMPILED_VARIANTS} compiled variants, its limit, and this pass needs another "
            f"one: queries {list(query.shape)}, keys {list(key.shape)}, {query.dtype}, {gradients} gradients. It would "
            "fall back to dense scores. Pack lengths follow train.max_tokens_per_gpu and should not matter: run once "
            "with TORCH_LOGS=recompiles, which names what differs"
        ) from None
    return out[0].transpose(0, 1)
