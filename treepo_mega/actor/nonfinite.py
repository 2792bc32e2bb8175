"""Where the first value that is not finite appears in a pass over packs: parameter, module, loss or gradient.

    found = first_non_finite(actor, packs, loss)
    found.text()        # "pack 0, forward pass: decoder.layers.1.mlp.linear_fc1 gave ..."; None: all is finite

Modules are watched by hooks. The first that is seen in time is the innermost one, for a module's own hook runs after
those of its parts. In the backward pass the first is the nearest to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treepo_mega.actor.forward import run_schedule
from treepo_mega.actor.losses import PackLoss
from treepo_mega.actor.update import Actor
from treepo_mega.loss.stats import Stats
from treepo_mega.tree.pack import Pack

PACK_ARRAYS = ("A_pos", "A_neg", "n", "count", "rollout_logprobs", "old_logprobs", "ref_logprobs")


@dataclass(frozen=True)
class NonFinite:
    """A tensor with values that are not finite. `where`: the pass; `pack`: its number, None outside a pack."""

    where: str
    name: str
    pack: int | None
    nan: int
    inf: int
    size: int
    inputs: str = ""

    def text(self) -> str:
        """One sentence."""
        place = f"pack {self.pack}, {self.where}" if self.pack is not None else self.where
        more = f"; {self.inputs}" if self.inputs else ""
        return f"{place}: {self.name} has {self.nan} NaN and {self.inf} infinite of {self.size} values{more}"


class _Found(Exception):
    """Ends the pass that is watched."""


class _Watch:
    """Hooks on a model; the first finding."""

    def __init__(self) -> None:
        self.pack: int | None = None
        self.found: NonFinite | None = None

    def check(self, where: str, name: str, tensor: Tensor, inputs: str = "") -> None:
        """End the pass when `tensor` is not finite."""
        if not tensor.is_floating_point():
            return
        finite = torch.isfinite(tensor)
        if bool(finite.all()):
            return
        nan = int(torch.isnan(tensor).sum())
        infinite = int((~finite).sum()) - nan
        self.found = NonFinite(where, name, self.pack, nan, infinite, tensor.numel(), inputs)
        raise _Found

    def after(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        """A forward hook; gradients of the outputs are watched in their turn."""
        for tensor in _tensors(output):
            self.check("forward pass", name, tensor, _describe(arguments))
            if tensor.requires_grad:
                tensor.register_hook(partial(self.gradient, name))

    def gradient(self, name: str, gradient: Tensor) -> None:
        """A hook of a module's output."""
        self.check("backward pass", f"the gradient of the output of {name}", gradient)


class _WatchedLoss:
    """A loss whose arguments and results are looked at."""

    def __init__(self, loss: PackLoss, watch: _Watch) -> None:
        self._loss = loss
        self._watch = watch
        self.needs_whole_packs = loss.needs_whole_packs

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        self._watch.check("loss head", "logprobs", logp)
        self._watch.check("loss head", "entropy", entropy)
        total, stats = self._loss(logp, entropy, pack)
        self._watch.check("loss", "the sum over rows", total)
        return total, stats


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _describe(arguments: Any) -> str:
    """The inputs of a module in words."""
    inputs = [tensor for tensor in _tensors(arguments) if tensor.is_floating_point() and tensor.numel()]
    if not inputs:
        return ""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in inputs):
        return "its input is not finite either"
    return f"its input is finite, at most {max(float(tensor.abs().max()) for tensor in inputs):.3g}"


def first_non_finite(actor: Actor, packs: Sequence[Pack], loss: PackLoss) -> NonFinite | None:
    """The first value that is not finite, in the order: parameters, a pack's numbers, its passes, gradients of weights.

    None: all is finite. Gradients are left in Megatron's buffers. One rank, one chunk.
    """
    (model,) = actor.models
    watch = _Watch()
    hooks = [module.register_forward_hook(partial(watch.after, name)) for name, module in model.named_modules() if name]
    try:
        for name, parameter in model.named_parameters():
            watch.check("parameters", name, parameter.detach())
        for number, pack in enumerate(packs):
            watch.pack = number
            for name in PACK_ARRAYS:
                values = getattr(pack, name)
                if values is not None:
                    watch.check("what it was packed with", name, torch.from_numpy(np.asarray(values)))
            for chunk in actor.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            replay = actor.cfg.rollout.routing_replay == "all"
            run_schedule(actor.chunks, [pack], actor.head, loss=_WatchedLoss(loss, watch), replay=replay)
            for name, parameter in model.named_parameters():
                watch.check("gradients", name, parameter.main_grad)
    except _Found:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return watch.found
