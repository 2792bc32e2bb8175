"""Branching inside a KV block without computing it again: a child copies its parent's partial block.

vLLM shares full KV blocks only, so a request whose prefix ends within a block computes that rest anew, on the CPU up
to 31 tokens for each branch. `BranchCache` is a vLLM KV connector (the interface by which vLLM takes keys and values
from elsewhere) whose elsewhere is the same cache: it looks for a block that begins with the tokens wanted behind the
same prefix, in a running request or in one that ended, and has the worker copy that block before the forward pass.

    llm = LLM(..., kv_transfer_config=KVTransferConfig(kv_connector="BranchCache", kv_role="kv_consumer",
                                                       kv_connector_module_path=branch_cache.__name__))

A copy holds what the parent computed, bit for bit. Blocks of ended requests are free and stay readable until they are
given out again: each carries a hash in vLLM's own table (for a full block vLLM's, for a partial one ours), which vLLM
takes away when it gives the block out or resets the prefix cache; an entry here is valid as long as its hash stands.

One pass of the scheduler: `get_num_new_matched_tokens` pins the block that it finds, so that nobody is given it in this
pass; `update_state_after_alloc` knows where its copy goes; `build_connector_meta` sends the copies and unpins. Nothing
is given out between that and the copy; where passes overlap (async scheduling), the worker takes them in order.

Every rank of a tensor-parallel engine runs its own scheduler over the same requests and so finds the same copies. The
interface is not bound to the CPU; on a GPU it has not been run.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    KVCacheBlockCopy,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from treepo_mega.engine.routing import ATTRIBUTE

GROUP = 0
"""The only KV cache group of a model whose layers all attend to everything."""


@dataclass
class Copies(KVConnectorMetadata):
    """What the worker does before the forward pass: whole blocks, by id (from, to), of a cache of `num_blocks`."""

    num_blocks: int
    pairs: list[KVCacheBlockCopy] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Left:
    """A block that an ended request left behind: what it holds, behind which prefix, and the hash that vouches."""

    block: KVCacheBlock
    parent: bytes
    tokens: tuple[int, ...]
    vouched_by: bytes | None

    @property
    def valid(self) -> bool:
        """False once vLLM gave the block out again or forgot its contents."""
        return self.block.block_hash == self.vouched_by


class BranchCache(KVConnectorBase_V1):
    """See the module docstring. vLLM makes one for its scheduler and one for its worker.

    `enabled` false: nothing is found, and vLLM computes the rest of a block again, to compare.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raises ValueError for a model with sliding windows or states, whose blocks cannot be told apart like this."""
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            raise ValueError(
                "branching inside KV blocks needs a model of full attention only, this one has "
                f"{[type(g.kv_cache_spec).__name__ for g in groups]}: set debug.copy_partial_blocks to false"
            )
        self.block_size: int = groups[0].kv_cache_spec.block_size
        self._num_blocks: int = kv_cache_config.num_blocks
        self.enabled = True
        self._pool: BlockPool | None = None
        self._running: dict[str, Request] = {}
        self._new: set[str] = set()  # nothing of theirs is computed yet
        self._left: dict[int, Left] = {}  # by block id
        self._behind: dict[bytes, set[int]] = {}  # hash of the prefix -> ids of the blocks left behind it
        self._whole: dict[tuple[bytes, tuple[int, ...]], int] = {}  # ... and its tokens -> the last such
        self._found: dict[str, tuple[KVCacheBlock, int]] = {}  # request -> source, index of the block it goes to
        self._pairs: list[KVCacheBlockCopy] = []

    # The scheduler's side.

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """vLLM's blocks, free ones and used ones."""
        self._pool = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens behind the request's first `num_computed_tokens` (full, shared blocks) that a copy would bring."""
        assert self._pool is not None
        if request.skip_reading_prefix_cache or not self.enabled:
            return 0, False
        found = (
            self._left_whole(request, num_computed_tokens)
            or self._running_whole(request, num_computed_tokens)
            or max(self._candidates(request, num_computed_tokens), key=lambda c: c[0], default=None)
        )
        if found is None or not found[0]:
            return 0, False
        # A pinned block is one that the request itself cannot get: leave enough for it, or it would wait forever.
        if self._pool.get_num_free_blocks() <= request.num_tokens // self.block_size + 1:
            return 0, False
        tokens, block = found
        self._pool.touch([block])
        self._found[request.request_id] = block, num_computed_tokens // self.block_size
        return tokens, False

    def _left_whole(self, request: Request, start: int) -> tuple[int, KVCacheBlock] | None:
        """As the best of `_candidates`, where an ended request left just what is wanted: what a child's parent does."""
        k = start // self.block_size
        wanted = tuple(request.all_token_ids[start : min(start + self.block_size, request.num_tokens - 1)])
        block_id = self._whole.get((request.block_hashes[k - 1] if k else b"", wanted))
        if not wanted or block_id is None or not self._left[block_id].valid:
            return None
        return len(wanted), self._left[block_id].block

    def _running_whole(self, request: Request, start: int) -> tuple[int, KVCacheBlock] | None:
        """As the best of `_candidates`, where a running request holds all that is wanted: what a sibling's does."""
        k = start // self.block_size
        end = min(start + self.block_size, request.num_tokens - 1)
        wanted = list(request.all_token_ids[start:end])
        parent: bytes = request.block_hashes[k - 1] if k else b""
        for name, other in self._running.items():
            # Compared as a whole: most of those that run belong to other trees, and part at once.
            if (
                other.num_computed_tokens >= end > start
                and list(other.all_token_ids[start:end]) == wanted
                and name not in self._new
                and (not k or other.block_hashes[k - 1] == parent)
            ):
                assert self._kv_cache_manager is not None
                return end - start, self._kv_cache_manager.get_blocks(name).blocks[GROUP][k]
        return None

    def _candidates(self, request: Request, start: int) -> Iterator[tuple[int, KVCacheBlock]]:
        """(tokens in common, block) of all blocks behind the request's first `start` tokens."""
        k = start // self.block_size
        # Never the last token: vLLM must compute it, for its logits give the first token to sample.
        wanted = request.all_token_ids[start : min(start + self.block_size, request.num_tokens - 1)]
        if not wanted:
            return
        parent: bytes = request.block_hashes[k - 1] if k else b""
        for name, other in self._running.items():
            computed = other.num_computed_tokens - start
            if computed <= 0 or name in self._new or len(other.block_hashes) < k:
                continue
            if not k or other.block_hashes[k - 1] == parent:
                assert self._kv_cache_manager is not None
                block = self._kv_cache_manager.get_blocks(name).blocks[GROUP][k]
                yield common(wanted, other.all_token_ids[start : start + computed]), block
        for i in list(self._behind.get(parent, ())):
            left = self._left[i]
            if left.valid:
                yield common(wanted, left.tokens), left.block
            else:
                self._forget(i)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """The request runs now, in `blocks`."""
        self._running[request.request_id] = request
        self._new.add(request.request_id)
        if num_external_tokens:
            source, k = self._found[request.request_id]
            self._pairs.append(KVCacheBlockCopy(source.block_id, blocks.blocks[GROUP][k].block_id))

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        """This pass's copies."""
        assert self._pool is not None
        copies = Copies(self._num_blocks, self._pairs)
        # Unpinned after the whole pass was allocated: before, another request of the pass could be given the source.
        self._pool.free_blocks([block for block, _ in self._found.values()])
        self._pairs, self._found = [], {}
        self._new.clear()
        return copies

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        """Remember the blocks that the request filled or began."""
        if self._running.pop(request.request_id, None) is not None:
            first = max(request.num_prompt_tokens - 1, 0) // self.block_size
            for k in range(first, -(-request.num_computed_tokens // self.block_size)):
                self._leave(request, k, block_ids[k])
        # False: vLLM frees the blocks at once. They stay readable until it gives them out again.
        return False, None

    def _leave(self, request: Request, k: int, block_id: int) -> None:
        """Remember block k of the request."""
        assert self._pool is not None
        start, block = k * self.block_size, self._pool.blocks[block_id]
        tokens = tuple(request.all_token_ids[start : min(start + self.block_size, request.num_computed_tokens)])
        parent: bytes = request.block_hashes[k - 1] if k else b""
        # An earlier request may have left the same block behind, with other tokens in it.
        self._forget(block_id)
        if block.block_hash is None:
            # A token is at most 8 bytes; the mark keeps our hashes apart from vLLM's, which are of full blocks.
            ours = hashlib.sha256(b"partial" + parent + struct.pack(f"<{len(tokens)}q", *tokens)).digest()
            key = make_block_hash_with_group_id(BlockHash(ours), GROUP)
            self._pool._insert_block_hash(key, block, num_tokens=start + len(tokens))
        self._left[block_id] = Left(block, parent, tokens, block.block_hash)
        self._behind.setdefault(parent, set()).add(block_id)
        self._whole[parent, tokens] = block_id

    def _forget(self, block_id: int) -> None:
        left = self._left.pop(block_id, None)
        if left is not None:
            if self._whole.get((left.parent, left.tokens)) == block_id:
                del self._whole[left.parent, left.tokens]
            behind = self._behind[left.parent]
            behind.remove(block_id)
            if not behind:
                del self._behind[left.parent]

    # The worker's side.

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """False: all copies are made before the forward pass, so whole-model CUDA graphs replay without them."""
        return False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy, in every layer."""
        copies = self._get_connector_metadata()
        assert isinstance(copies, Copies)
        if copies.pairs:
            # Of the engine that runs: vLLM has one connector a process, however many engines live in it.
            layers = forward_context.no_compile_layers.values()
            caches = [layer.kv_cache for layer in layers if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)]
            copy_kv_cache_blocks_inplace(caches, copies.num_blocks, copies.pairs)
            # What the routers chose is kept by slot, beside the keys (`engine/routing.py`).
            notes = next((found for layer in layers if (found := getattr(layer, ATTRIBUTE, None)) is not None), None)
            if notes is not None:
                notes.copy(copies.pairs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """The copy is there before the forward pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept anywhere else."""

    def wait_for_save(self) -> None:
        """Nothing is kept anywhere else."""


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that both have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
