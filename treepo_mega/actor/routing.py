"""Routing replay: tokens go to the experts that the engine sent them to (`rollout.routing_replay`).

    watch_routing(models)                       # once, after building: every router gets a `PackReplay`
    tell_routers(model, pack)                   # before the forward pass of each micro-batch
    with replaying(models, on=True): ...        # a pass

A mixture's choice is a step function of its logits. Where engine and trainer round differently, a token goes to another
expert and its logprob jumps; with every update more do (Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning
Training and Inference Routers" (2025), which calls this R3). Replayed are the ids alone: weights of experts are taken
from this pass's logits at these ids, so the router learns as before.

`PackReplay` is Megatron's `RouterReplay` with three differences. A token without noted experts (padding, the end of a
path, nothing else of a tree sampled with the key) is routed as usual. Megatron's list of all replays stays empty: it
would keep every model. And recomputed layers need no switch between two actions: their first forward pass has no
gradients, so it puts its ids in a queue, and the second one, in the order of micro-batches, takes them out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as ps
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor, nn

from treepo_mega.actor.losses import on_device
from treepo_mega.actor.moe import PackRouter, routers
from treepo_mega.runtime import dist
from treepo_mega.tree.pack import Pack, StepPlan
from treepo_mega.tree.routing import unnoted


class PackReplay(RouterReplay):
    """What one layer's router replays, and how often it would have chosen otherwise."""

    def __init__(self) -> None:
        super().__init__()
        RouterReplay.global_router_replay_instances.remove(self)
        self.on = False
        """Whether the engine's choice is taken; else it is only compared."""
        self.gradients = False
        """Whether the pass has gradients: a forward pass without them is then one that will be recomputed."""
        self.compared: list[tuple[Tensor, Tensor]] = []
        """Of each micro-batch: tokens whose choice differs [], tokens with noted experts []."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: Any = None,
        group_topk: Any = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [t, E] -> (scores of the chosen [t, top_k], their ids)."""
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        told, again = self._due()
        if told is None:
            return values, chosen
        told = told.to(chosen.dtype)
        known = told[:, :1] >= 0
        if not again:
            differs = (told.sort(-1).values != chosen.sort(-1).values).any(-1, keepdim=True)
            self.compared.append(((differs & known).sum(), known.sum()))
        if not self.on:
            return values, chosen
        chosen = torch.where(known, told, chosen)
        return scores.gather(1, chosen), chosen

    def _due(self) -> tuple[Tensor | None, bool]:
        """(ids [t, top_k] of the micro-batch that is computed, -1 where none are noted; is it computed again?)."""
        if self.gradients and not torch.is_grad_enabled():
            self.replay_backward_list.append(self.target_topk_idx)
        elif self.replay_backward_list:
            return self.replay_backward_list.pop(0), True
        return self.target_topk_idx, False


def watch_routing(chunks: Sequence[nn.Module]) -> None:
    """Let the routers of these chunks know what the engine chose."""
    for router in routers(chunks):
        router.router_replay = PackReplay()


def _replays(chunks: Sequence[nn.Module]) -> list[tuple[PackRouter, PackReplay]]:
    pairs = ((router, router.router_replay) for router in routers(chunks))
    return [(router, replay) for router, replay in pairs if isinstance(replay, PackReplay)]


@contextlib.contextmanager
def replaying(chunks: Sequence[nn.Module], *, on: bool, gradients: bool) -> Iterator[None]:
    """A pass that takes the engine's choice (`on`) or only compares; nothing without `watch_routing`."""
    replays = [replay for _, replay in _replays(chunks)]
    for replay in replays:
        replay.on = on
        replay.gradients = gradients
    try:
        yield
    finally:
        for replay in replays:
            # What an error left behind must not meet the next pass.
            replay.clear_indices()
            replay.on = replay.gradients = False


def tell_routers(chunk: nn.Module, pack: Pack) -> None:
    """Give the routers of a chunk the experts of a pack's tokens that this rank computes."""
    replays = _replays([chunk])
    if not replays:
        return
    if pack.experts is None:
        for _, replay in replays:
            replay.target_topk_idx = None
        return
    ids = on_device(_own_ids(pack, sequence_parallel=bool(replays[0][0].config.sequence_parallel)))
    for router, replay in replays:
        # Megatron counts layers of the whole model from 1: a pipeline stage takes its own.
        replay.target_topk_idx = ids[:, router.layer_number - 1]


def _own_ids(pack: Pack, *, sequence_parallel: bool) -> np.ndarray:
    """[t, layers, top_k] int16 of the tokens whose routing this rank computes, -1 where no experts are noted."""
    assert pack.experts is not None
    ids = pack.experts if pack.local is None else pack.experts[pack.local]
    if sequence_parallel:
        ids = np.split(ids, ps.get_tensor_model_parallel_world_size())[ps.get_tensor_model_parallel_rank()]
    return np.where(ids == unnoted(ids.dtype), -1, ids.astype(np.int16))


def take_routing(chunks: Sequence[nn.Module]) -> dict[str, float]:
    """The share of routings (token and layer) that were compared since the last call and differ from the engine's.

    Collective over all ranks. Nothing without `watch_routing`, or where nothing was compared.
    """
    replays = [replay for _, replay in _replays(chunks)]
    if not replays:
        return {}
    compared = [pair for replay in replays for pair in replay.compared]
    for replay in replays:
        replay.compared = []
    # Every rank computes other tokens or other layers: experts and tensor parallelism need sequence parallelism.
    mine = torch.stack([torch.stack(pair) for pair in compared]).sum(0).tolist() if compared else [0, 0]
    sums = dist.sum_over_ranks({"differs": float(mine[0]), "known": float(mine[1])})
    return {"train/routing_differs": sums["differs"] / sums["known"]} if sums["known"] else {}


def routing_noted(plans: Sequence[StepPlan]) -> float:
    """The share of rows whose predicting token has experts of the engine. Collective over all ranks."""
    rows = known = 0
    for pack in (pack for plan in plans for pack in plan.packs):
        rows += len(pack.predictor)
        if pack.experts is not None:
            place = pack.predictor if pack.local is None else pack.local[pack.predictor]
            known += int((pack.experts[place, 0, 0] != unnoted(pack.experts.dtype)).sum())
    # Stages of a pipeline hold the same packs.
    counts = ps.get_pipeline_model_parallel_rank() == 0
    sums = dist.sum_over_replicas({"rows": float(rows), "known": float(known)}, counts=counts)
    return sums["known"] / max(1.0, sums["rows"])
