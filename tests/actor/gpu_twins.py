"""Stand-ins on the CPU for what needs a GPU in a transformer layer, with the same parameters, names and sums.

    with pretend_gpu() as calls: ...        # models built and trained here are made of them; calls["fused"] counts

The kernel of Apex that adds a weight gradient to its buffer is one line of torch here, behind Megatron's own code that
calls it. Transformer Engine's modules are Megatron's with the norm in front, chosen by Megatron's own Transformer
Engine spec. So what is checked is ours: which modules a layer gets, by which names reshard finds their parameters, who
adds which gradient where. What the real kernels compute only a GPU can show.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def _apex_kernel(calls: Counter[str]) -> ModuleType:
    """The module `fused_weight_gradient_mlp_cuda`."""

    def add(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [N, K] += grad_output [T, N]^T @ inputs [T, K]."""
        calls["fused"] += 1
        main_grad.addmm_(grad_output.t(), inputs)

    kernel = ModuleType("fused_weight_gradient_mlp_cuda")
    kernel.wgrad_gemm_accum_fp32 = add  # type: ignore[attr-defined]
    return kernel


def _provider() -> type:
    """What stands in for Megatron's TESpecProvider."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from treepo_mega.actor.layers import RMSNorm

    class Fused:
        """Transformer Engine's name for the switch."""

        @property
        def fuse_wgrad_accumulation(self) -> bool:
            return self.gradient_accumulation_fusion

        @fuse_wgrad_accumulation.setter
        def fuse_wgrad_accumulation(self, on: bool) -> None:
            self.gradient_accumulation_fusion = on

    class NormColumn(Fused, ColumnParallelLinear):
        """As TELayerNormColumnParallelLinear: a norm whose weight is the linear module's own."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **more: Any) -> None:
            super().__init__(input_size, output_size, config=config, **more)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel

        def forward(self, x: Tensor, *more: Any) -> Any:
            eps = self.config.layernorm_epsilon
            return super().forward(F.rms_norm(x, (self.input_size,), self.layer_norm_weight, eps), *more)

    class Row(Fused, RowParallelLinear):
        """As TERowParallelLinear."""

    class Provider(LocalSpecProvider):
        """Megatron's questions, answered as TESpecProvider does."""

        def row_parallel_linear(self) -> type:
            return Row

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormColumn

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
            return RMSNorm

    return Provider


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Counter[str]]:
    """Layers believe in a GPU with Apex's kernel and Transformer Engine; tensors stay where they are."""
    from megatron.core.tensor_parallel import layers as megatron_layers

    from treepo_mega.actor import layers
    from treepo_mega.loss import te

    calls: Counter[str] = Counter()
    kernel = _apex_kernel(calls)
    loaded = SimpleNamespace(import_module=lambda name: SimpleNamespace(__name__=name))
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (layers, "has_cuda", lambda: True),
            (te, "has_cuda", lambda: True),
            (te, "importlib", loaded),
            (layers.gpt_layer_specs, "TESpecProvider", _provider()),
            (megatron_layers, "_grad_accum_fusion_available", True),
            (megatron_layers, kernel.__name__, kernel),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(mock.patch.dict(sys.modules, {kernel.__name__: kernel}))
        yield calls
