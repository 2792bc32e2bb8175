"""A vLLM worker as the destination of a reshard: its own sharded parameters, written in place.

    target = engine.weight_target()                  # VllmTarget of this rank's worker
    target.init_weight_transfer(vllm_layout(spec, tp, tp_rank))
    resharder(chunks, target)                        # start, update of every parameter, finish

Where a module keeps its parameters plain (norms, embeddings, everything unquantised on CUDA), the reshard writes
straight into them. Where the engine packs or quantises (linear layers on the CPU, FP8), vLLM's layer-wise reload
is used: the module gets back the unpacked parameters it was created with, they are filled, and when the last of
them is whole the module packs itself into its old storage. Only modules that are being filled exist unpacked.
Packing seconds are the target's, apart from transport.

The reload is driven with the functions of vllm.model_executor.model_loader.reload of vLLM 0.32: the public entry
(`reload_weights`) takes full tensors only and would make every rank receive the whole model.

Traps: the packed copy that a tied LM head computes with is not the embedding's, so it is packed again at the end. A
bias stays a real tensor throughout. Where quantising asks the engine's other ranks (a scale over a dimension that they
share), modules wait unpacked for the end and are packed in the map's order: ranks finish them in different orders, and
in the middle of the rounds one would wait for a scale while another waits for its parcel. After `abort_weight_update`
the modules have their old storage back, some with new contents: the owner must not sample before a complete update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.modelspec.mcore_layout import ParamLayout
from treepo_mega.runtime.device import has_cuda


class VllmTargetError(TreepoError):
    """The engine's parameters are not those of the map, or the phases came in a wrong order; names the parameter."""


class VllmTarget:
    """See the module's page. `worker` is vLLM's worker object of this rank."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._model: nn.Module = worker.model_runner.get_model()
        self._layout: Mapping[str, ParamLayout] | None = None
        self._modules: dict[str, tuple[nn.Module, str]] = {}
        self._padded: set[str] = set()
        self._stale_padding: set[str] = set()
        self._left: dict[nn.Module, set[str]] = {}
        self._open: set[nn.Module] = set()
        self._whole: set[nn.Module] = set()
        self._updating = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's parameters before packing."""
        return self._worker.model_config.dtype

    def init_weight_transfer(self, layout: Mapping[str, ParamLayout]) -> None:
        """Bind the map. Raises VllmTargetError unless names and unpacked shapes are exactly the engine's."""
        shapes: dict[str, tuple[int, ...]] = {}
        seen: dict[int, str] = {}
        for prefix, module in self._model.named_modules():
            for short, (shape, identity) in _unpacked(module).items():
                name = f"{prefix}.{short}" if prefix else short
                if seen.setdefault(identity, name) == name:  # a tied head is the embedding's own parameter
                    shapes[name] = shape
                    self._modules[name] = (module, short)
        for name, param in layout.items():
            if shapes.get(name) != param.shape:
                found = list(shapes[name]) if name in shapes else f"no such parameter{nearest(name, shapes)}"
                raise VllmTargetError(f"the map says {name} {list(param.shape)}; the engine has {found}")
        if extra := sorted(set(shapes) - set(layout)):
            raise VllmTargetError(f"the engine has {extra[0]} {list(shapes[extra[0]])}, which the map does not know")
        self._layout = layout
        self._padded = {n for n, p in layout.items() if sum(b.numel for b in p.blocks) < math.prod(p.shape)}

    def start_weight_update(self) -> None:
        """Begin: nothing of the model changes until a buffer is asked for."""
        if self._layout is None:
            raise VllmTargetError("start_weight_update: call init_weight_transfer first")
        if self._updating:
            raise VllmTargetError("start_weight_update: the update before has neither finished nor been aborted")
        self._updating = True
        # A sleep of level 2 leaves anything in the rows that no checkpoint fills.
        self._stale_padding = set(self._padded)
        self._left = {}
        for name in self._layout:
            module, short = self._modules[name]
            self._left.setdefault(module, set()).add(short)

    def buffer(self, chunk: int, name: str) -> Tensor:
        """The parameter to write, unpacked; padding rows are zero."""
        module, short = self._modules[name]
        if _is_packed(module) and module not in self._open:
            self._unpack(module)
        data: Tensor = getattr(module, short).data
        if name in self._stale_padding:
            self._stale_padding.discard(name)
            data.zero_()
        return data

    def update_weight(self, chunk: int, name: str) -> None:
        """One parameter is whole; with its last one a module packs itself."""
        module, short = self._modules[name]
        self._left[module].discard(short)
        if not self._left[module] and module in self._open:
            # Packing it asks the other ranks, which finish modules in another order: packed here, they could deadlock.
            if _scale_is_shared(module):
                self._whole.add(module)
            else:
                self._pack(module)

    def finish_weight_update(self) -> None:
        """All parameters were handed over: pack what waited, and the tied LM head.

        Collective over the engine's ranks.
        """
        if missing := [n for n, (m, s) in self._modules.items() if s in self._left.get(m, ())]:
            raise VllmTargetError(f"finish_weight_update: {len(missing)} parameters missing, such as {missing[0]}")
        # The map's order is the same on every rank of the engine: each of these packs asks the other ranks.
        for module in dict.fromkeys(self._modules[name][0] for name in self._layout or ()):
            if module in self._whole:
                self._pack(module)
        self._whole.clear()
        self._updating = False
        if self._worker.model_config.hf_config.tie_word_embeddings and not has_cuda():
            repack_tied_head(self._model)

    def abort_weight_update(self) -> None:
        """Give every module its storage back."""
        from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

        for module in self._open:
            info = get_layerwise_info(module)
            _place_kernel_tensors(module, info)
            info.reset()
        self._open.clear()
        self._whole.clear()
        self._updating = False

    def _pack(self, module: nn.Module) -> None:
        """A whole module packs (and quantises) itself into its old storage."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

        method: Any = module.quant_method
        if not has_cuda() and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # the CPU's experts are packed only while their kernel is built
        with set_current_vllm_config(self._worker.vllm_config):
            _layerwise_process(module, get_layerwise_info(module))
        self._open.discard(module)

    def _unpack(self, module: nn.Module) -> None:
        """What vLLM's initialize_layerwise_reload does to a layer, for this one only, and memory for its parameters."""
        from vllm.model_executor.model_loader.reload.layerwise import (
            get_layerwise_info,
            initialize_online_processing,
        )
        from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
        from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

        info = get_layerwise_info(module)
        info.kernel_tensors = get_layer_params_buffers(module)
        info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
        restore_layer_on_meta(module, info)
        initialize_online_processing(module)
        materialize_layer(module, info)
        self._open.add(module)


def repack_tied_head(model: nn.Module) -> None:
    """vLLM's CPU LM head computes with a packed copy, which nothing but this renews when the embedding changes."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = model.lm_head
    assert isinstance(head, nn.Module)
    dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _unpacked(module: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Parameter -> (shape before packing, identity) of a module's own parameters, without those that packing makes."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    recorded, _ = get_layerwise_info(module).restore_metadata
    out = {}
    for short, param in module._parameters.items():
        # Not recorded, yet loaded: a bias. Not recorded and not that: a scale of the quantised weight.
        if param is not None and (short in recorded or short in SKIP_TENSORS or not _is_quantised(module)):
            out[short] = (tuple(recorded[short].shape if short in recorded else param.shape), id(param))
    return out


def _is_quantised(module: nn.Module) -> bool:
    """True for a linear layer that is given plain weights and quantises them itself."""
    from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase

    return isinstance(getattr(module, "quant_method", None), OnlineLinearBase)


def _scale_is_shared(module: nn.Module) -> bool:
    """True for a module whose quantisation is collective: its scale spans a dimension that the engine's ranks share."""
    from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerTensorOnlineLinearMethod

    if not _is_quantised(module) or module.tp_size == 1:
        return False
    rows_whole = module.input_size == module.input_size_per_partition
    return not rows_whole or isinstance(module.quant_method, Fp8PerTensorOnlineLinearMethod)


def _is_packed(module: nn.Module) -> bool:
    """True for a module that computes with something else than its plain parameters."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    method = getattr(module, "quant_method", None)
    if method is None:
        return False
    if not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        return True
    return not has_cuda() and isinstance(module, LinearBase | ParallelLMHead)
