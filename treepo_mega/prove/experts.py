"""Bridges for experts: fake tensors do not hold which ones a token takes, so all are taken equally often.

Megatron's alltoall dispatcher reads from the router's choice how many tokens each rank sends and receives. Here the
numbers are those of even loads, and the dispatcher's own code does the rest: it permutes, sends, sorts and puts back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


class Chosen(torch.autograd.Function):
    """masked_select of so many values: it keeps the mask and computes nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, count: int) -> Tensor:
        """values, mask [E, T] -> [count]."""
        ctx.save_for_backward(values, mask)
        return values.new_empty(count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the values."""
        values, _ = ctx.saved_tensors
        return torch.empty_like(values), None, None


def permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's `permute`, [T, K] -> [num_out_tokens, K]: a token's place is not known, their number is."""
    mask = routing_map.T.contiguous()
    places = mask.new_empty(num_out_tokens, dtype=torch.long)
    chosen = Chosen.apply(probs.T.contiguous(), mask, num_out_tokens)
    return tokens.index_select(0, places), chosen, places


def preprocess(dispatcher: MoEAlltoAllTokenDispatcher, routing_map: Tensor) -> np.ndarray[Any, Any]:
    """What the dispatcher counts, of even loads, as numbers; returns the tokens of each of this rank's experts."""
    experts = dispatcher.num_experts
    routed = routing_map.size(0) * dispatcher.config.moe_router_topk
    ends = np.arange(experts + 1) * routed // experts
    of_expert = np.diff(ends)
    mine = of_expert[dispatcher.local_expert_indices]
    ep, tp, local = dispatcher.ep_size, dispatcher.tp_size, dispatcher.num_local_experts
    dispatcher.num_out_tokens = routed
    if ep > 1 or tp > 1:
        dispatcher.input_splits = of_expert.reshape(ep, local).sum(1).tolist()
        dispatcher.output_splits = [int(mine.sum())] * ep
        dispatcher.output_splits_tp = np.full(tp, ep * mine.sum())
    dispatcher.num_global_tokens_per_local_expert = np.tile(mine, (tp * ep, 1))
    chunks = np.arange(experts * tp)
    dispatcher.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
    dispatcher.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()
    return mine * (tp * ep)


def patches() -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, stand-in) of every bridge."""
    yield MoEAlltoAllTokenDispatcher, "preprocess", preprocess
    # The numbers are on the host already.
    yield MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", lambda self, point, count=None: count
    # Selects by a mask, of which a fake tensor does not say how many are set.
    yield token_dispatcher, "permute", permute
